// A chat completion as it comes.

/** What the server, or the way to it, says instead of an answer. `retry`: seconds to wait, if it says so. */
export class Refused extends Error {
  constructor(status, message, retry = null) {
    super(message);
    this.status = status;
    this.retry = retry;
  }
}

/** Headers of a request, with the key if there is one. */
export function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** The answer, if it is one; throws `Refused` otherwise. */
async function checked(answer) {
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  const message = said.error?.message ?? said.detail ?? `The server answered ${answer.status}.`;
  const retry = Number.parseInt(answer.headers.get("Retry-After") ?? "", 10);
  throw new Refused(answer.status, String(message), Number.isNaN(retry) ? null : retry);
}

/** Ask the first model for an answer to `body`; `onDelta` gets each piece, `onFinish` the reason for its end. Throws
    `Refused`, or what `signal` aborts with. */
export async function complete(body, key, signal, onDelta, onFinish) {
  const models = await checked(await fetch("/v1/models", { headers: headers(key), signal }));
  const model = (await models.json()).data[0].id;
  const answer = await checked(
    await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers(key) },
      body: JSON.stringify({ ...body, model, stream: true }),
      signal,
    }),
  );
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  let done = false;
  for (;;) {
    const { value, done: over } = await reader.read();
    if (over) break;
    const lines = (kept + value).split(/\r?\n/);
    kept = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") {
        done = true;
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(500, chunk.error.message ?? "The server failed.");
      const choice = chunk.choices?.[0];
      if (choice?.delta) onDelta(choice.delta);
      if (choice?.finish_reason) onFinish(choice.finish_reason);
    }
  }
  if (!done) throw new TypeError("the connection ended before the answer did");
}
