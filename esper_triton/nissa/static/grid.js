// Layers as rows, seeds as cells: one tab stop, arrow keys inside.
import { make, rounded, title } from "./dom.js";

// A letter for each state, so that colour is not all that tells them apart.
const GLYPHS = ["", "e", "l", "t", "g", "s", "v", "f", "■", "×", "–", "↶", "!", "?"];

export const glyph = (state) => GLYPHS[state] ?? "?";
export const stateName = (states, state) => states[state] ?? "UNKNOWN";

export class Grid {
  /** `open(place)` is called when a seed is chosen. */
  constructor(element, open) {
    this.element = element;
    this.cells = [];
    this.rows = [];
    this.only = null;
    this.current = 0;
    element.addEventListener("click", (event) => {
      const cell = event.target.closest(".cell");
      if (cell) open(Number(cell.dataset.place));
    });
    element.addEventListener("keydown", (event) => this.move(event));
    element.addEventListener("focusin", (event) => {
      const cell = event.target.closest(".cell");
      if (cell) this.stand(Number(cell.dataset.place));
    });
  }

  /** Everything anew, of another model or another set of seeds. */
  build(model, states) {
    this.states = states;
    this.model = model;
    this.cells = [];
    this.rows = model.layers.map(() => []);
    for (let place = 0; place < model.count; place++) this.rows[model.layer[place]].push(place);
    const rows = model.layers.map((name, index) => {
      const cells = this.rows[index].map((place) => {
        const cell = make("button", { type: "button", class: "cell", role: "gridcell", tabindex: "-1", "data-place": place });
        this.cells[place] = cell;
        return cell;
      });
      const head = make("span", { role: "rowheader", title: name }, name);
      return make("div", { class: "layer", role: "row" }, head, make("div", { class: "cells", role: "presentation" }, ...cells));
    });
    for (let place = 0; place < model.count; place++) this.paint(place);
    this.element.replaceChildren(...rows);
    this.element.setAttribute("aria-rowcount", rows.length);
    this.stand(Math.min(this.current, Math.max(model.count - 1, 0)));
  }

  /** One seed as it is now. */
  paint(place) {
    const { model, states } = this, cell = this.cells[place], state = model.state[place];
    cell.dataset.s = state;
    cell.textContent = glyph(state);
    cell.style.setProperty("--a", model.alpha[place] ?? 0);
    cell.classList.toggle("chosen", state === this.only);
    const parts = [`seed ${model.seed[place]} of ${model.layers[model.layer[place]]}`, title(stateName(states, state))];
    if (model.alpha[place]) parts.push(`alpha ${rounded(model.alpha[place])}`);
    if (model.health[place] !== null) parts.push(`health ${rounded(model.health[place])}`);
    if (model.errors[place]) parts.push(`${model.errors[place]} errors`);
    const label = parts.join(", ");
    cell.setAttribute("aria-label", label);
    cell.title = label;
  }

  /** Dims all states but one; null shows all. */
  show(state) {
    this.only = state;
    this.element.toggleAttribute("data-only", state !== null);
    this.cells.forEach((cell, place) => cell.classList.toggle("chosen", this.model.state[place] === state));
  }

  select(place) {
    this.element.querySelector('[aria-selected="true"]')?.removeAttribute("aria-selected");
    if (place !== null) this.cells[place]?.setAttribute("aria-selected", "true");
  }

  stand(place) {
    this.cells[this.current]?.setAttribute("tabindex", "-1");
    this.current = place;
    this.cells[place]?.setAttribute("tabindex", "0");
  }

  focus() {
    this.cells[this.current]?.focus();
  }

  move(event) {
    const place = this.current, row = this.model?.layer[place];
    if (row === undefined) return;
    const column = this.rows[row].indexOf(place);
    const across = (step) => {
      for (let next = row + step; next >= 0 && next < this.rows.length; next += step) {
        const cells = this.rows[next];
        if (cells.length) return cells[Math.min(column, cells.length - 1)];
      }
      return place;
    };
    const moves = {
      ArrowRight: () => Math.min(place + 1, this.cells.length - 1),
      ArrowLeft: () => Math.max(place - 1, 0),
      ArrowDown: () => across(1),
      ArrowUp: () => across(-1),
      Home: () => (event.ctrlKey ? 0 : this.rows[row][0]),
      End: () => (event.ctrlKey ? this.cells.length - 1 : this.rows[row].at(-1)),
    };
    const to = moves[event.key];
    if (!to) return;
    event.preventDefault();
    this.stand(to());
    this.focus();
  }
}
