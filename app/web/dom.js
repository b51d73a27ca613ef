/** Making elements, and writing numbers for people. */

/** An element; attributes named `on…` are listeners, nulls and falses are left out. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

export const byId = (id) => document.getElementById(id);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** 1530000000 → "1.53 G". */
export function quantity(value, unit = "") {
  const prefixes = ["", "k", "M", "G", "T", "P"];
  let power = 0;
  while (Math.abs(value) >= 1000 && power < prefixes.length - 1) {
    value /= 1000;
    power += 1;
  }
  return `${power ? measured(value) : Math.round(value)} ${prefixes[power]}${unit}`.trim();
}

export function seconds(value) {
  return value < 0.1 ? `${Math.round(value * 1000)} ms` : `${measured(value)} s`;
}

export function percent(fraction) {
  return `${Math.round(fraction * 100)} %`;
}

/** Three significant digits, no exponent. */
export function measured(value) {
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

/** A count, or a mean of counts. */
export function counted(value) {
  return Number.isInteger(value) ? String(value) : measured(value);
}
