// Building the page. Text only ever becomes text nodes: nothing that a model says is markup.

/** An element with properties (`class`, `data-`, `aria-` and the like as attributes) and children, nodes or text. */
export function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** A number with three digits at the most. */
export function short(value) {
  if (value === 0 || value >= 99.95) return Math.round(value).toLocaleString("en");
  return value >= 9.995 ? value.toFixed(1) : value.toFixed(2);
}

/** Bytes with a unit; GB = 10^9. */
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  for (; value >= 999.5 && i < units.length - 1; i++) value /= 1000;
  return i ? `${short(value)} ${units[i]}` : `${Math.round(value)} B`;
}
