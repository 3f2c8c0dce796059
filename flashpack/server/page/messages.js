// Messages on the page. A message: {role, content, reasoning, calls: [{name, arguments}], finish}.
import { make } from "./dom.js";
import { render } from "./markdown.js";

const ENDS = {
  length: "Ended at the limit of tokens.",
  stopped: "Stopped.",
  broken: "The answer broke off.",
  cancelled: "Cancelled by the server.",
};

/** A message as an article; `update` shows what it says by now. */
export class Shown {
  constructor(message) {
    this.message = message;
    const mine = message.role === "user";
    this.body = make("div", { class: "body", dir: "auto" });
    this.element = make("article", { class: `message ${message.role}` });
    this.element.append(make("h3", {}, mine ? "You" : "Answer"), this.body);
    if (!mine) {
      this.thoughts = make("div", { dir: "auto" });
      this.thinking = make("details", { class: "thinking", hidden: "" }, make("summary", {}, "Thinking"), this.thoughts);
      this.body.before(this.thinking);
      this.copied = make("span", { role: "status", class: "soft" });
      this.end = make("span", { class: "soft" });
      const copy = make("button", { type: "button" }, "Copy");
      copy.addEventListener("click", () => this.copy());
      this.tools = make("div", { class: "tools", hidden: "" }, copy, this.copied, this.end);
      this.element.append(this.tools);
    }
    this.update();
  }

  update(writing = false) {
    const { message } = this;
    if (message.role === "user") {
      this.body.textContent = message.content;
      return;
    }
    this.thinking.hidden = !message.reasoning;
    this.thoughts.textContent = message.reasoning;
    this.body.replaceChildren(...answer(message.content), ...message.calls.map((call) => callOf(call.name, call.arguments)));
    if (writing && !message.content && !message.calls.length) {
      this.body.append(make("p", { class: "soft" }, message.reasoning ? "Thinking …" : "Reading …"));
    }
    this.tools.hidden = writing;
    this.end.textContent = ENDS[message.finish] ?? "";
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.message.content);
      this.copied.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(this.body);
      this.copied.textContent = "Selected; copy it with the keyboard.";
    }
  }
}

/** The answer's nodes: calls that the model wrote as text are shown as calls. */
function answer(text) {
  return text.split(/(<tool_call>[^]*?(?:<\/tool_call>|$))/).flatMap((part) => {
    const inner = /^<tool_call>([^]*?)(<\/tool_call>)?$/.exec(part);
    if (!inner) return render(part);
    let call = null;
    try {
      call = JSON.parse(inner[1]);
    } catch {
      // not whole yet, or not JSON
    }
    return [typeof call?.name === "string" ? callOf(call.name, JSON.stringify(call.arguments ?? {})) : callOf("", inner[1].trim())];
  });
}

/** A call with a row for each argument; as it is if the arguments are no JSON object. */
function callOf(name, args) {
  const box = make("div", { class: "call", role: "group", "aria-label": "Tool call" });
  box.append(make("span", { class: "soft" }, "Calls a tool "), make("code", { dir: "auto" }, name));
  let parsed = null;
  try {
    parsed = JSON.parse(args);
  } catch {
    // shown as it is
  }
  if (parsed && typeof parsed === "object" && !Array.isArray(parsed)) {
    const value = (one) => (typeof one === "string" ? one : JSON.stringify(one));
    const rows = Object.entries(parsed).map(([key, one]) =>
      make("tr", {}, make("th", { scope: "row", dir: "auto" }, key), make("td", { dir: "auto" }, value(one))),
    );
    box.append(make("table", {}, make("tbody", {}, ...rows)));
  } else if (args) {
    box.append(make("pre", { dir: "ltr", tabindex: "0" }, make("code", {}, args)));
  }
  return box;
}
