// The panels around the grid: legend, facts, cache, forge, log.
import { bytes, clock, find, make, pairs, rounded, span, title } from "./dom.js";
import { glyph, stateName } from "./grid.js";

const MOST_LINES = 300;

/** States with their counts; pressing one shows it alone. */
export function legend(seen, model, only, choose) {
  const counts = new Map();
  for (const state of model.state ?? []) counts.set(state, (counts.get(state) ?? 0) + 1);
  const focused = document.activeElement?.dataset?.state;
  const buttons = [...counts.keys()].sort((a, b) => a - b).map((state) => {
    const button = make(
      "button",
      { type: "button", "aria-pressed": String(state === only), "data-state": state },
      make("span", { class: "swatch", "data-s": state, "aria-hidden": "true" }, glyph(state)),
      `${title(stateName(seen.states, state))} ${counts.get(state)}`,
    );
    button.addEventListener("click", () => choose(state === only ? null : state));
    return button;
  });
  find("legend").replaceChildren(...buttons);
  if (focused !== undefined) buttons.find((button) => button.dataset.state === focused)?.focus();
}

export function facts(model) {
  const values = [["seeds", model.count ?? 0], ["layers", model.layers?.length ?? 0]];
  if (model.epoch !== null) values.push(["epoch", model.epoch]);
  if (model.seen_at) values.push(["seen", clock(model.seen_at)]);
  pairs(find("facts"), values);
}

export function cache(model) {
  const { hits, misses, evictions, entries, bytes: size, pinned } = model.cache ?? {};
  if (hits === undefined) {
    find("cache").replaceChildren(make("div", { class: "quiet" }, "Told at every epoch; none has begun yet."));
    return;
  }
  const loads = hits + misses;
  pairs(find("cache"), [
    ["hits", loads ? `${hits} of ${loads} (${Math.round((100 * hits) / loads)} %)` : "no load yet"],
    ["kernels", `${entries}, ${pinned} in use`],
    ["code", bytes(size)],
    ["given up", evictions],
  ]);
}

export function forge(seen) {
  const workers = seen.bus.groups.tezzeret;
  const waiting = [...seen.jobs.values()].filter((job) => job.outcome === "waiting").length;
  find("queue").textContent = workers
    ? `${workers.lag} waiting, ${workers.held} with a worker`
    : `${waiting} without an answer; no worker has joined this bus`;
  const rows = [...seen.jobs.values()].reverse().map((job) => {
    const made = job.artifacts.map((id) => make("div", {}, id));
    const state = job.outcome === "failed" ? make("span", { class: "failed" }, `failed: ${job.message}`) : make("span", {}, job.outcome);
    return make(
      "tr",
      { class: job.outcome === "failed" ? "failure" : null },
      make("td", {}, clock(job.at)),
      make("td", {}, job.what, job.reason === "specialisation_miss" ? make("div", { class: "quiet" }, `missed by ${job.layer} ${job.seed}`) : null),
      make("td", {}, `${job.targets.join(", ")} ${job.dtype}, ${job.pipeline}`),
      make("td", {}, state, ...made),
      make("td", {}, job.answered_at ? span(job.answered_at - job.at) : ""),
    );
  });
  find("jobs").replaceChildren(...rows);
}

/** One line of a log. */
export function line(entry) {
  const where = entry.layer === null ? entry.model : `${entry.layer} ${entry.seed ?? ""}`;
  return make(
    "li",
    { class: entry.failure ? "failure" : null, "data-number": entry.number },
    make("time", {}, clock(entry.at)),
    make("b", {}, entry.failure ? `${entry.kind}, failure` : entry.kind),
    where ? make("span", {}, where) : null,
    make("span", {}, entry.text),
    entry.trace_id ? make("span", { class: "quiet" }, `trace ${entry.trace_id.slice(0, 12)}`) : null,
  );
}

export function log(seen) {
  const kinds = find("kind"), known = new Set([...kinds.options].map((option) => option.value));
  for (const entry of seen.entries) {
    if (!known.has(entry.kind)) {
      known.add(entry.kind);
      kinds.append(make("option", { value: entry.kind }, entry.kind));
    }
  }
  const kind = kinds.value, text = find("text").value.trim().toLowerCase(), failures = find("failures").checked;
  const fits = (entry) =>
    (!kind || entry.kind === kind) &&
    (!failures || entry.failure) &&
    (!text || [entry.text, entry.layer, entry.model, entry.artifact_id, entry.trace_id].some((value) => value?.toLowerCase().includes(text)));
  const fitting = seen.entries.filter(fits);
  find("log").replaceChildren(...fitting.slice(-MOST_LINES).reverse().map(line));
  find("shown").textContent = `${Math.min(fitting.length, MOST_LINES)} of ${seen.entries.length}`;
}

export const percent = (value) => (value === null ? null : `${rounded(100 * value, 1)} %`);
