"use strict";
// Elements out of plain data, and figures as people write them.

const $ = (id) => document.getElementById(id);
/** An element; strings among the children become text. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== ""));
  return node;
}
function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== ""));
}
/** Small print under a figure or a name. */
const small = (...words) => make("span", { class: "small" }, ...words);

// Figures; what is unknown is a dash.
const unknown = (value) => value === null || value === undefined;
function figure(value) { return unknown(value) ? "–" : value.toFixed(4); }
function signed(value, places = 4) {
  return unknown(value) ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(places);
}
function percent(value) { return unknown(value) ? "–" : (value < 0 ? "−" : "+") + Math.abs(value * 100).toFixed(1) + " %"; }
function probability(value) {
  if (unknown(value)) return "p –";
  return value < 0.001 ? "p < 0.001" : `p = ${value.toFixed(3)}`;
}
function count(value) {
  const short = value < 10000 ? { maximumFractionDigits: 0 } : { notation: "compact", maximumSignificantDigits: 3 };
  return unknown(value) ? "–" : value.toLocaleString("en", short);
}
function exact(value) { return unknown(value) ? "unknown" : value.toLocaleString("en"); }
function memory(value) {
  if (unknown(value)) return "–";
  return value < 1024 ? `${value.toFixed(0)} MB` : `${(value / 1024).toFixed(1)} GB`;
}
function duration(value) {
  if (unknown(value)) return "–";
  if (value < 59.5) return `${value < 10 ? value.toFixed(value < 1 ? 2 : 1) : value.toFixed(0)} s`;
  // Rounded first: 119.6 s are 2 min 0 s and not 1 min 60 s.
  const whole = Math.round(value), minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes} min ${whole % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
/** A metric's name as the field writes it. */
function title(metric) {
  const [stem, k] = metric.split("@");
  const short = ["ndcg", "mrr", "map", "auc"].includes(stem);
  const written = short ? stem.toUpperCase() : stem[0].toUpperCase() + stem.slice(1);
  return k ? `${written}@${k}` : written;
}
const several = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
function kindSign(kind) {
  return make("span", { class: `shape ${kindName(kind)}`, "aria-hidden": "true" }, KINDS[kindName(kind)].sign);
}
function options(select, entries, chosen) {
  const chose = (value) => (String(value) === String(chosen) ? "" : null);
  fill(select, entries.map(([value, words]) => make("option", { value, selected: chose(value) }, words)));
}
/** A plain table; `kind` is the class of all columns but the first. */
function grid(node, head, lines, kind = null) {
  const column = (words, place) => make("th", { scope: "col", class: place ? kind : null }, words);
  const cell = (words, place) => (place ? make("td", { class: kind }, words) : make("th", { scope: "row" }, words));
  const body = lines.map((line) => make("tr", {}, line.map(cell)));
  fill(node, make("thead", {}, make("tr", {}, head.map(column))), make("tbody", {}, body));
}
