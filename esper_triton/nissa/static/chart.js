// Lines over time between 0 and 1, as SVG.
import { clock, make, rounded } from "./dom.js";

const HEIGHT = 200, LEFT = 30, RIGHT = 8, TOP = 8, BOTTOM = 22;
const NAMESPACE = "http://www.w3.org/2000/svg";

function shape(tag, attributes, text) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Draws `series` ({alpha: [...], health: [...]}; null leaves a gap) at the moments `at`. */
export function draw(container, at, series) {
  const WIDTH = Math.max(container.clientWidth, 240); // so that text has its size wherever it stands
  if (!at.length) {
    container.replaceChildren(make("p", { class: "quiet" }, "Nothing was measured yet."));
    return;
  }
  const first = at[0], wide = Math.max(at[at.length - 1] - first, 1e-9);
  const x = (moment) => LEFT + ((WIDTH - LEFT - RIGHT) * (moment - first)) / wide;
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value);
  const latest = Object.entries(series).map(([name, values]) => `${name} ${rounded(values[values.length - 1]) ?? "not measured"}`);
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `Over time; now ${latest.join(", ")}` });
  for (const value of [0, 0.5, 1]) {
    svg.append(shape("line", { class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, String(value)));
  }
  svg.append(shape("text", { x: LEFT, y: HEIGHT - 6 }, clock(first)));
  svg.append(shape("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, clock(at[at.length - 1])));
  for (const [name, values] of Object.entries(series)) {
    let path = "", pen = "M";
    values.forEach((value, k) => {
      if (value === null) {
        pen = "M";
        return;
      }
      path += `${pen}${x(at[k]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    });
    if (path) svg.append(shape("path", { class: name, d: path, "stroke-linecap": "round" }));
  }
  const key = make("div", { class: "key" }, ...latest.map((text, k) => make("span", {}, make("i", { class: Object.keys(series)[k] }), text)));
  container.replaceChildren(svg, key);
}
