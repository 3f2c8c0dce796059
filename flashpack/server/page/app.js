// The chat: sends, shows what comes, keeps the conversation in this tab.
import { byId, make } from "./dom.js";
import { watch } from "./live.js";
import { Shown } from "./messages.js";
import { complete, Refused } from "./stream.js";

const FIELDS = ["system", "temperature", "max-tokens"];
const REDRAW = 80; // milliseconds between two pictures of an answer that comes; more where drawing takes long
const kept = read("conversation", { messages: [], fields: {} });
const messages = kept.messages;
let key = sessionStorage.getItem("flashpack-key") ?? "";
let running = null; // AbortController of the answer that comes

const wake = watch(
  () => key,
  () => { byId("key-form").hidden = false; },
);

function read(name, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(`flashpack-${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function keep() {
  const fields = Object.fromEntries(FIELDS.map((id) => [id, byId(id).value]));
  try {
    sessionStorage.setItem("flashpack-conversation", JSON.stringify({ messages, fields }));
  } catch {
    // The tab's storage is full: the conversation goes on, and a reload will not find it.
  }
}

function add(message) {
  byId("empty")?.remove();
  const shown = new Shown(message);
  byId("messages").append(shown.element);
  return shown;
}

/** Say why there is no answer, and offer what to do next. */
function notice(text, action = "", act = null) {
  const box = byId("notice");
  box.replaceChildren(make("span", { dir: "auto" }, text));
  box.hidden = !text;
  if (!action) return null;
  const button = make("button", { type: "button" }, action);
  button.addEventListener("click", act);
  box.append(button);
  return button;
}

function setRunning(controller) {
  running = controller;
  byId("stop").hidden = !controller;
  byId("send").hidden = Boolean(controller);
  if (!controller && document.activeElement === document.body) byId("text").focus();
}

function request() {
  const said = messages
    .filter((one) => one.role === "user" || one.content || one.calls.length)
    .map(({ role, content, calls }) => {
      if (!calls?.length) return { role, content };
      const tools = calls.map((call, i) => ({ id: `call_${i}`, type: "function", function: call }));
      return { role, content, tool_calls: tools };
    });
  const system = byId("system").value.trim();
  const body = { messages: system ? [{ role: "system", content: system }, ...said] : said };
  const [temperature, most] = [byId("temperature"), byId("max-tokens")].map((field) => field.valueAsNumber);
  if (!Number.isNaN(temperature)) body.temperature = temperature;
  if (!Number.isNaN(most)) body.max_tokens = most;
  return body;
}

/** Reads an answer aloud paragraph by paragraph: each token would be noise, the whole comes late. */
function speaker() {
  const log = byId("spoken");
  log.replaceChildren();
  let said = 0;
  return (text, over) => {
    const end = over ? text.length : text.lastIndexOf("\n\n");
    if (end <= said) return;
    log.append(make("p", {}, text.slice(said, end).trim()));
    said = end;
  };
}

async function answer() {
  const controller = new AbortController();
  const body = request();
  const message = { role: "assistant", content: "", reasoning: "", calls: [], finish: "" };
  const shown = add(message);
  messages.push(message);
  notice("");
  byId("key-form").hidden = true;
  setRunning(controller);
  byId("status").textContent = "The model is answering.";
  shown.update(true);
  shown.element.scrollIntoView({ block: "nearest" });
  const speak = speaker();
  let timer = 0;
  let pause = REDRAW;
  const redraw = () => {
    timer = 0;
    const begun = performance.now();
    const low = innerHeight + scrollY >= document.documentElement.scrollHeight - 120;
    shown.update(true);
    speak(message.content, false);
    const box = shown.element.getBoundingClientRect();
    const bottom = byId("bottom").getBoundingClientRect().top;
    if (low || (box.bottom > bottom && box.bottom < bottom + 120)) scrollBy(0, Math.max(0, box.bottom - bottom));
    pause = Math.max(REDRAW, 4 * (performance.now() - begun));
  };
  const take = (delta) => {
    message.content += delta.content ?? "";
    message.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
    for (const call of delta.tool_calls ?? []) {
      const one = (message.calls[call.index ?? message.calls.length] ??= { name: "", arguments: "" });
      one.name += call.function?.name ?? "";
      one.arguments += call.function?.arguments ?? "";
    }
    timer ||= setTimeout(redraw, pause);
  };
  wake();
  try {
    await complete(body, key, controller.signal, take, (why) => { message.finish = why; });
  } catch (error) {
    const begun = message.content || message.reasoning || message.calls.length;
    message.finish = controller.signal.aborted ? "stopped" : "broken";
    if (!begun) {
      if (messages.at(-1) === message) messages.pop();
      shown.element.remove();
    }
    if (!controller.signal.aborted) explain(error, begun ? message : null, shown);
  } finally {
    clearTimeout(timer);
    setRunning(null);
    shown.update();
    speak(message.content, true);
    const stopped = message.finish === "stopped" ? "Stopped." : "";
    byId("status").textContent = stopped || (message.finish === "broken" ? "" : "The answer is complete.");
    keep();
    wake();
  }
}

function explain(error, partial, shown) {
  const again = () => {
    if (partial && messages.at(-1) === partial) {
      messages.pop();
      shown.element.remove();
    }
    if (!running) answer();
  };
  if (!(error instanceof Refused)) {
    notice("The server does not answer. Is flashpack serve still running?", "Try again", again);
  } else if (error.status === 401) {
    byId("key-form").hidden = false;
    byId("key").focus();
    notice(key ? "The server does not accept this key." : "");
  } else if (error.status === 429) {
    let left = error.retry ?? 5;
    const button = notice("The server is busy with other requests.", `Try again in ${left} s`, again);
    button.disabled = true;
    const timer = setInterval(() => {
      left--;
      button.disabled = left > 0;
      button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left <= 0) clearInterval(timer);
    }, 1000);
  } else if (error.status >= 500) {
    notice(error.message, "Try again", again);
  } else {
    notice(`The server refuses this: ${error.message}. Change the settings, or begin a new chat.`, "Try again", again);
  }
}

byId("chat").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text || running) return;
  for (const id of FIELDS) {
    if (byId(id).checkValidity()) continue;
    byId("settings").open = true;
    byId(id).reportValidity();
    return;
  }
  byId("text").value = "";
  const message = { role: "user", content: text };
  messages.push(message);
  add(message);
  keep();
  answer();
});

byId("text").addEventListener("keydown", (event) => {
  // Not while an input method composes a word: there Enter chooses it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("chat").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});

byId("stop").addEventListener("click", () => {
  running?.abort();
  byId("text").focus();
});

byId("new").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  byId("messages").replaceChildren();
  notice("");
  keep();
  byId("text").focus();
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  sessionStorage.setItem("flashpack-key", key);
  byId("key").value = "";
  byId("key-form").hidden = true;
  notice("");
  wake();
  if (messages.at(-1)?.role === "user" && !running) answer();
  byId("text").focus();
});

for (const id of FIELDS) {
  byId(id).value = kept.fields[id] ?? "";
  byId(id).addEventListener("change", keep);
}
const last = messages.at(-1);
if (last?.role === "assistant") last.finish ||= "broken"; // left while it came
messages.forEach(add);
addEventListener("pagehide", keep);
