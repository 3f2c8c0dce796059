// Markdown as models write it: blocks, then what stands in a line. Images are links, HTML is text.
import { make } from "./dom.js";

const DEEPEST = 6;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;

/** Nodes for a text. */
export function render(text, depth = 0) {
  const lines = text.replaceAll("\t", "    ").split("\n");
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const fence = /^ {0,3}(`{3,}|~{3,})/.exec(line);
    const heading = /^(#{1,6}) +(.*)$/.exec(line);
    if (!line.trim()) {
      i++;
    } else if (fence) {
      const begin = ++i;
      while (i < lines.length && !lines[i].trim().startsWith(fence[1])) i++;
      const code = make("code", {}, lines.slice(begin, i++).join("\n"));
      blocks.push(make("pre", { dir: "ltr", tabindex: "0" }, code));
    } else if (heading) {
      blocks.push(make("h4", { dir: "auto" }, ...inline(heading[2])));
      i++;
    } else if (RULE.test(line)) {
      blocks.push(make("hr"));
      i++;
    } else if (line.startsWith(">") && depth < DEEPEST) {
      const begin = i;
      while (i < lines.length && lines[i].startsWith(">")) i++;
      const inner = lines.slice(begin, i).map((one) => one.replace(/^> ?/, "")).join("\n");
      blocks.push(make("blockquote", { dir: "auto" }, ...render(inner, depth + 1)));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const [list, next] = listAt(lines, i, depth);
      blocks.push(list);
      i = next;
    } else if (line.includes("|") && /^[ |:-]+$/.test(lines[i + 1] ?? "") && lines[i + 1].includes("-")) {
      const begin = i;
      i += 2;
      while (i < lines.length && lines[i].includes("|")) i++;
      blocks.push(tableOf([line, ...lines.slice(begin + 2, i)]));
    } else {
      const begin = i++;
      while (i < lines.length && lines[i].trim() && !/^(#{1,6} | {0,3}(`{3,}|~{3,})|>)/.test(lines[i]) && !ITEM.test(lines[i])) i++;
      blocks.push(make("p", { dir: "auto" }, ...inline(lines.slice(begin, i).join("\n"))));
    }
  }
  return blocks;
}

function listAt(lines, i, depth) {
  const first = ITEM.exec(lines[i]);
  const numbered = /\d/.test(first[2]);
  const list = make(numbered ? "ol" : "ul", { dir: "auto" });
  if (numbered) list.start = Number.parseInt(first[2], 10);
  while (i < lines.length) {
    const item = ITEM.exec(lines[i]);
    if (!item || item[1].length > first[1].length + 1 || /\d/.test(item[2]) !== numbered) break;
    const inner = [item[3]];
    const inset = item[1].length + 2;
    for (i++; i < lines.length; i++) {
      const more = lines[i].trim() ? lines[i].search(/\S/) >= inset : (lines[i + 1] ?? "").search(/\S/) >= inset;
      if (!more) break;
      inner.push(lines[i].slice(inset));
    }
    const nodes = render(inner.join("\n"), depth + 1);
    list.append(make("li", { dir: "auto" }, ...(nodes[0]?.localName === "p" ? [...nodes.shift().childNodes, ...nodes] : nodes)));
    while (i + 1 < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1])) i++;
  }
  return [list, i];
}

function tableOf(lines) {
  const [head, ...rows] = lines.map((line) => line.trim().replace(/^\||\|$/g, "").split("|"));
  const cells = (row, name) => make("tr", {}, ...row.map((cell) => make(name, { dir: "auto" }, ...inline(cell.trim()))));
  const body = make("tbody", {}, ...rows.map((row) => cells(row, "td")));
  return make("div", { class: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, cells(head, "th")), body));
}

const PAIRS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

/** Nodes for text within a block. */
function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const push = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  for (let i = 0; i < text.length; ) {
    const rest = text.slice(i, i + 2);
    const found = depth < DEEPEST && (codeAt(text, i) || linkAt(text, i, depth) || pairAt(text, i, depth));
    if (found) {
      push(found.node);
      i = found.end;
    } else if (rest[0] === "\\" && /[\\`*_~[\]()#>!|-]/.test(rest[1] ?? "")) {
      plain += rest[1];
      i += 2;
    } else {
      plain += rest[0];
      i++;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

function codeAt(text, i) {
  if (text[i] !== "`") return null;
  let begin = i;
  while (text[begin] === "`") begin++;
  const end = text.indexOf(text.slice(i, begin), begin);
  return end < 0 ? null : { node: make("code", { dir: "ltr" }, text.slice(begin, end)), end: end + begin - i };
}

function linkAt(text, i, depth) {
  const at = text[i] === "!" ? i + 1 : i;
  if (text[at] === "[") {
    const link = /^\[([^\[\]\n]{0,500})\]\(([^\s()]{1,2000})(?: "[^"\n]{0,500}")?\)/.exec(text.slice(at, at + 3100));
    const address = link && safe(link[2]);
    return address ? { node: anchor(address, inline(link[1] || address, depth + 1)), end: at + link[0].length } : null;
  }
  if (text[i] !== "h" || (i && /\w/.test(text[i - 1]))) return null;
  const bare = /^https?:\/\/[^\s<>"'`)\]]{1,2000}/.exec(text.slice(i, i + 2010));
  const shown = bare && bare[0].replace(/[.,;:!?]+$/, "");
  const address = bare && safe(shown);
  return address ? { node: anchor(address, [shown]), end: i + shown.length } : null;
}

function safe(address) {
  const url = URL.canParse(address) ? new URL(address) : null;
  return url && ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
}

function anchor(address, children) {
  return make("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

function pairAt(text, i, depth) {
  for (const [mark, name] of PAIRS) {
    if (!text.startsWith(mark, i)) continue;
    const begin = i + mark.length;
    if (/\s/.test(text[begin] ?? " ") || (mark[0] === "_" && /\w/.test(text[i - 1] ?? " "))) return null;
    const end = text.indexOf(mark, begin + 1);
    if (end < 0 || /\s/.test(text[end - 1]) || (mark === "*" && text[end + 1] === "*")) continue;
    return { node: make(name, {}, ...inline(text.slice(begin, end), depth + 1)), end: end + mark.length };
  }
  return null;
}
