// The picture of the run: asks the server a few times a second while the page is seen.
import { bytes, byId, make, short } from "./dom.js";
import { ExpertMap } from "./map.js";
import { headers } from "./stream.js";

const EVERY = 250;
const IDLE = 1000;
const LOST = 3000;
const TIMES = [
  ["hits", "Computing experts that were in memory"],
  ["waits", "Waiting for reads"],
  ["misses", "Computing experts that were read"],
  ["rest", "The rest: attention, routers, sampling"],
];
const MEMORY = [
  ["arena", "Experts"],
  ["dense", "The rest of the model"],
  ["kv", "What was read (KV cache)"],
  ["work", "Working space"],
  ["base", "The program"],
];

/** A stacked bar and its table; `parts`: [label, value, text]. */
function stack(bar, table, parts) {
  const total = parts.reduce((sum, [, value]) => sum + value, 0) || 1;
  const body = table.tBodies[0];
  if (body.rows.length !== parts.length) {
    bar.replaceChildren(...parts.map((_, i) => make("i", { class: `c${i}` })));
    body.replaceChildren(
      ...parts.map(([label], i) =>
        make("tr", {}, make("th", { scope: "row" }, make("i", { class: `key c${i}` }), label), make("td", { class: "n" }), make("td", { class: "n" })),
      ),
    );
  }
  parts.forEach(([, value, text], i) => {
    bar.children[i].hidden = !value;
    bar.children[i].style.width = `${(100 * value) / total}%`;
    body.rows[i].cells[1].textContent = text;
    body.rows[i].cells[2].textContent = `${Math.round((100 * value) / total)} %`;
  });
}

function showTime(time) {
  const tokens = Math.max(time.tokens, 1);
  const of = time.of === "reading" ? "Of reading the prompt" : `Milliseconds per token, over ${time.tokens} tokens of this answer`;
  byId("time-text").textContent = `${of}.`;
  stack(
    byId("time-bar"),
    byId("time-table"),
    TIMES.map(([key, label]) => [label, time[key], `${short((1000 * time[key]) / tokens)} ms`]),
  );
}

const PHASES = {
  reading: (run) => `Reading ${run.prompt_tokens || "the"} tokens.`,
  writing: (run) => `Writing, ${run.tokens} tokens so far.`,
  done: (run) => `At rest. The last answer had ${run.tokens} tokens` + (run.tokens_per_second ? `, ${short(run.tokens_per_second)} a second.` : "."),
};

function show(state, map) {
  byId("model").textContent = state.model;
  byId("phase").textContent = state.run ? PHASES[state.run.phase](state.run) : "At rest.";
  byId("n-tokens").textContent = short(state.tokens_per_second);
  const rate = state.hit_rate ?? state.hit_rate_total;
  byId("n-hits").textContent = rate === null ? "–" : `${short(100 * rate)} %`;
  byId("n-reads").textContent = short(state.reads_per_second);
  byId("n-bytes").textContent = bytes(state.bytes_per_second);
  map.show(state.map);
  if (state.run && (state.run.time.tokens || state.run.phase === "reading")) showTime(state.run.time);
  stack(byId("memory-bar"), byId("memory-table"), MEMORY.map(([key, label]) => [label, state.memory[key], bytes(state.memory[key])]));
}

/** Begin; `keyOf` gives the API key, `onRefused` is called where it is not the right one. Returns a function that asks
    at once. */
export function watch(keyOf, onRefused) {
  const map = new ExpertMap(byId("map"));
  byId("layers").addEventListener("toggle", () => map.table());
  let timer = 0;
  async function ask() {
    let wait = LOST;
    try {
      const answer = await fetch("/live", { headers: headers(keyOf()) });
      if (answer.ok) {
        const state = await answer.json();
        show(state, map);
        byId("live-error").textContent = "";
        wait = state.busy ? EVERY : IDLE;
      } else {
        byId("live-error").textContent = "The server gives no picture now.";
        if (answer.status === 401) onRefused();
      }
    } catch {
      byId("live-error").textContent = "The server does not answer; trying again.";
    }
    clearTimeout(timer);
    if (!document.hidden) timer = setTimeout(ask, wait);
  }
  function wake() {
    clearTimeout(timer);
    timer = setTimeout(ask, 0);
  }
  document.addEventListener("visibilitychange", wake);
  wake();
  return wake;
}
