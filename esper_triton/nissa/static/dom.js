// Making and filling elements. Text is always set as text: names come from anywhere.

/** An element with attributes and children; a child that is a string is text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const find = (id) => document.getElementById(id);

/** Fills a <dl> with pairs; a value of null is shown as what it is, not measured. */
export function pairs(list, values) {
  const shown = (value) =>
    value === null || value === undefined ? make("dd", { class: "quiet" }, "not measured") : make("dd", {}, String(value));
  list.replaceChildren(...values.map(([name, value]) => make("div", {}, make("dt", {}, name), shown(value))));
}

export const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour12: false });

export function span(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 120 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds / 60)} min`;
}

export function bytes(count) {
  let size = count;
  for (const unit of ["B", "KiB", "MiB"]) {
    if (size < 1024) return `${unit === "B" ? size : size.toFixed(1)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(1)} GiB`;
}

export const rounded = (value, digits = 3) => (value === null || value === undefined ? null : Number(value.toFixed(digits)));

export const title = (name) => name.toLowerCase().replaceAll("_", " ");
