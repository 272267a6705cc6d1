// One seed in full, and what an operator may do with it.
import { draw } from "./chart.js";
import { confirmed, send } from "./operator.js";
import { bytes, clock, find, make, pairs, rounded, title } from "./dom.js";
import { stateName } from "./grid.js";
import { ask } from "./link.js";
import { line, percent } from "./panels.js";

const REFRESH_MS = 1500;
const OPERATIONS = [
  ["advance", "Advance", "It moves on to the state that follows, at the next step boundary."],
  ["cull", "Cull", "It stops contributing, and its parameters are lost."],
  ["unload", "Unload", "Its kernel is taken out, and the slot is free again."],
];

export class Detail {
  constructor(seen, closed) {
    this.seen = seen;
    this.closed = closed;
    this.of = null;
    this.artifact = null;
    find("close").addEventListener("click", () => this.close());
    find("detail").addEventListener("keydown", (event) => event.key === "Escape" && this.close());
    setInterval(() => this.of && this.refresh(), REFRESH_MS);
  }

  async open(model, layer, seed) {
    this.of = { model, layer, seed };
    this.artifact = null;
    find("detail-title").textContent = `Seed ${seed} of ${layer}`;
    find("outcome").textContent = "";
    find("artifact").replaceChildren();
    find("operations").replaceChildren(
      ...OPERATIONS.map(([command, label, meaning]) => {
        const button = make("button", { type: "button", class: command === "advance" ? null : "danger" }, label);
        button.addEventListener("click", () => this.operate(command, label, meaning));
        return button;
      }),
    );
    find("detail").hidden = false;
    document.querySelector("main").classList.add("open");
    find("detail").focus({ preventScroll: true });
    await this.refresh();
  }

  close() {
    this.of = null;
    find("detail").hidden = true;
    document.querySelector("main").classList.remove("open");
    this.closed();
  }

  async refresh() {
    const of = this.of;
    const query = new URLSearchParams({ model: of.model, layer: of.layer, seed: of.seed });
    const { ok, body } = await ask(`/api/seed?${query}`);
    if (this.of !== of) return; // another was opened meanwhile
    if (!ok) {
      this.tell(body.error, true);
      return;
    }
    const { signal, history } = body;
    this.state = title(stateName(this.seen.states, signal.state));
    pairs(find("signal"), [
      ["state", this.state],
      ["alpha", rounded(signal.alpha)],
      ["columns", `${signal.chunk[0]} to ${signal.chunk[1]}`],
      ["epoch, step", `${signal.epoch}, ${signal.step}`],
      ["health", rounded(signal.health_score)],
      ["launch, us", rounded(signal.execution_latency_us, 1)],
      ["load, us", rounded(signal.kernel_load_latency_us, 1)],
      ["errors", signal.error_count],
      ["activation variance", rounded(signal.activation_variance, 4)],
      ["dead neurons", percent(signal.dead_neuron_ratio)],
      ["correlation", rounded(signal.avg_correlation, 4)],
      ["ready to move", signal.is_ready_for_transition ? "yes" : "no"],
    ]);
    draw(find("seed-chart"), history.at, { alpha: history.alpha, health: history.health });
    const entries = body.entries.map(line).reverse();
    find("seed-log").replaceChildren(...(entries.length ? entries : [make("li", { class: "quiet" }, "No move was seen yet.")]));
    if (!body.artifact_id) {
      this.artifact = null;
      find("artifact").replaceChildren(make("p", { class: "quiet" }, "None, or none whose load was seen."));
    } else if (body.artifact_id !== this.artifact) {
      this.artifact = body.artifact_id;
      await this.showArtifact(body.artifact_id);
    }
  }

  async showArtifact(id) {
    const { body } = await ask(`/api/artifacts/${id}`);
    if (this.artifact !== id) return;
    const head = make("p", {}, make("b", {}, id));
    if (body.error) {
      find("artifact").replaceChildren(head, make("p", { class: "failed" }, body.error));
      return;
    }
    const { manifest } = body, facts = make("dl", { class: "pairs" });
    pairs(facts, [
      ["design", manifest.blueprint_name],
      ["status", manifest.status],
      ["target", `${manifest.target.backend} ${manifest.target.arch}`],
      ["dtype", manifest.dtype],
      ["dims", Object.entries(manifest.dims).map(([name, size]) => `${name}=${size}`).join(" ")],
      ["pipeline", manifest.pipeline],
      ["kernels", manifest.kernels.map((kernel) => kernel.name).join(" ")],
      ["built", manifest.created_at],
      ["compile, s", rounded(manifest.compile_seconds)],
      ["size", bytes(body.size_bytes)],
      ["tags", body.tags.join(" ") || "none"],
      ["signed by", body.signed_by ?? "nobody"],
    ]);
    const unfold = (name, text) => make("details", {}, make("summary", {}, name), make("pre", { tabindex: "0" }, text));
    const changes = body.history.map((change) => `${change.when}  ${change.what}  ${change.target ?? ""}`).join("\n");
    find("artifact").replaceChildren(
      head,
      facts,
      body.report ? unfold("Validation report", JSON.stringify(body.report, null, 1)) : make("p", { class: "quiet" }, "It has no validation report."),
      unfold("Lineage and history", `${body.lineages.length ? `in the lineage of: ${body.lineages.join(", ")}` : "in no saved model's lineage"}\n${changes}`),
      unfold("Blueprint", body.blueprint ?? body.blueprint_error),
    );
  }

  tell(text, failed = false) {
    find("outcome").textContent = text;
    find("outcome").classList.toggle("failed", failed);
  }

  async operate(command, label, meaning) {
    const of = this.of;
    const sure = await confirmed(`${label} seed ${of.seed} of ${of.layer}?`, `${meaning} It is ${this.state} now, in model ${of.model}.`, label);
    if (!sure) return;
    this.tell(`${label}: waiting for the model's next step boundary`);
    const { ok, body } = await send({ ...of, command });
    if (this.of !== of) return;
    if (!ok) {
      this.tell(`${label} was not done: ${body.error}`, true);
    } else {
      const applied = body.status === "applied";
      this.tell(`${label}: ${body.status}${body.reason ? `, ${body.reason}` : ""} (${clock(Date.now() / 1000)})`, !applied);
      await this.refresh();
    }
  }
}
