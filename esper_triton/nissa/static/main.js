// The page: messages in, panels out, at most once for each frame of the screen.
import { draw } from "./chart.js";
import { Detail } from "./detail.js";
import { find, make } from "./dom.js";
import { Grid } from "./grid.js";
import { Link, identify } from "./link.js";
import { openToken, prepare, token } from "./operator.js";
import { cache, facts, forge, legend, log } from "./panels.js";
import { Seen } from "./seen.js";

const SAID = { live: "live", away: "the server is away; trying again", locked: "a token is needed to look" };
const seen = new Seen();
let chosen = null;
let only = null;
let waits = false;
const touched = new Map();

const detail = new Detail(seen, () => {
  grid.select(null);
  grid.focus();
});
const grid = new Grid(find("grid"), (place) => {
  grid.select(place);
  const model = seen.models.get(chosen);
  detail.open(chosen, model.layers[model.layer[place]], model.seed[place]);
});

function choose(name) {
  chosen = name;
  touched.set(name, "all");
  paint();
}

function paint() {
  waits = false;
  const names = [...seen.models.keys()];
  if (!seen.models.has(chosen) && names.length) {
    chosen = names[0];
    touched.set(chosen, "all");
  }
  const select = find("model");
  if (select.options.length !== names.length) {
    select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
    find("model-choice").hidden = names.length < 2;
  }
  select.value = chosen ?? "";
  const model = seen.models.get(chosen);
  if (model) {
    const changed = touched.get(chosen);
    find("grid").hidden = !model.count;
    find("empty").hidden = Boolean(model.count);
    if (model.count && changed === "all") {
      grid.only = only;
      grid.build(model, seen.states);
    } else if (changed) {
      changed.forEach((place) => grid.paint(place));
    }
    legend(seen, model, only, (state) => {
      only = state;
      grid.show(state);
      later();
    });
    facts(model);
    cache(model);
    draw(find("chart"), model.means.at, { alpha: model.means.alpha, health: model.means.health });
    find("notice").hidden = !model.damaged.length;
    find("notice").textContent = `State arrays are damaged in ${model.damaged.join(", ")}: roll back to the last checkpoint.`;
  }
  touched.clear();
  forge(seen);
  log(seen);
  document.body.dataset.painted = Number(document.body.dataset.painted ?? 0) + 1;
}

function later() {
  if (!waits) {
    waits = true;
    requestAnimationFrame(paint);
  }
}

identify(token);
const link = new Link(
  (message) => {
    for (const [name, places] of seen.take(message)) {
      const before = touched.get(name) ?? new Set(); // a page in the background is not painted, and takes many
      if (places === "all" || before === "all") touched.set(name, "all");
      else touched.set(name, new Set([...before, ...places]));
    }
    later();
  },
  (state) => {
    find("link").textContent = SAID[state];
    find("link").className = `link ${state}`;
    if (state === "locked") openToken();
  },
);
prepare(() => link.again());
find("model").addEventListener("change", (event) => choose(event.target.value));
for (const id of ["kind", "text", "failures"]) find(id).addEventListener("input", later);
