// The server's API, in OpenAI's dialect.

const KEY = "sapwood-key"; // the live page's key too

/** The key lives as long as the tab. */
export const apiKey = () => sessionStorage.getItem(KEY) ?? "";
export const keepApiKey = (key) => sessionStorage.setItem(KEY, key.trim());

/** What the server, or the way to it, says against a request; `status` is 0 without an answer. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The models that can chat: {id, contextLength, hasReasoning, seesImages}; and whether any draws. */
export async function listModels() {
  const response = await ask("v1/models", {});
  const { data } = await response.json();
  const models = data
    .filter((card) => card.is_generation !== false)
    .map((card) => ({
      id: card.id,
      contextLength: card.max_model_len ?? null,
      hasReasoning: card.has_reasoning === true,
      // Other servers do not say so, and then the server decides.
      seesImages: card.media?.includes("image") ?? true,
    }));
  return { models, canDraw: data.some((card) => card.task === "text-to-image") };
}

/** The chunks of a streamed chat completion. Raises ApiError; AbortError once `signal` says so. */
export async function* streamChat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const event of events(response.body, signal)) {
    if (event.error) throw new ApiError(event.error.message, event.error.code ?? 0);
    yield event;
  }
}

export async function ask(path, { headers = {}, ...options }) {
  const key = apiKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw new ApiError(await errorMessage(response), response.status);
  return response;
}

async function errorMessage(response) {
  try {
    const body = await response.json();
    return (body.error ?? body).message ?? `The server answered with status ${response.status}.`;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/** The JSON of each event up to [DONE]. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await next(reader, signal);
    if (done) throw lost();
    pending += value;
    const complete = pending.split("\n\n");
    pending = complete.pop();
    for (const event of complete) {
      if (!event.startsWith("data:")) continue;
      const data = event.slice("data:".length).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function next(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    throw signal.aborted ? error : lost();
  }
}

export const lost = () =>
  new ApiError("The connection was lost before the answer ended. What came until then is kept.");
