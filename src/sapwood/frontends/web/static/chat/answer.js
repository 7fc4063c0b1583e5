// One answer while it is being written: the stream's deltas become fields of the message.

import { streamChat } from "./api.js";

/**
 * Ask the server, and write into `message` until the answer ends, fails or is stopped.
 * changed  called after each change; returns {stop, ended}: ended is a promise that never fails
 */
export function writeAnswer(message, body, changed) {
  const controller = new AbortController();
  const clock = { startMs: performance.now(), thinkMs: null, firstMs: null, firstTokens: 0 };
  message.error = null;
  message.finish = null;

  async function write() {
    try {
      for await (const chunk of streamChat(body, controller.signal)) {
        take(message, chunk, clock);
        changed();
      }
    } catch (error) {
      if (controller.signal.aborted) message.finish = "stopped";
      else message.error = error.message;
    }
    endThinking(message, clock);
    changed();
  }
  return { stop: () => controller.abort(), ended: write() };
}

/** What every request says, and what the settings add. */
export function requestBody(model, messages, settings) {
  return {
    model,
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...settings,
  };
}

function take(message, chunk, clock) {
  const now = performance.now();
  const choice = chunk.choices?.[0];
  const thought = choice?.delta?.reasoning_content;
  const said = choice?.delta?.content;
  const numTokens = chunk.usage?.completion_tokens;
  if (thought || said) {
    clock.firstMs ??= now;
    clock.firstTokens ||= numTokens ?? 1;
    clock.lastMs = now;
  }
  if (thought) {
    clock.thinkMs ??= now;
    message.reasoning = (message.reasoning ?? "") + thought;
  }
  if (said) {
    endThinking(message, clock);
    message.content += said;
  }
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  message.stats = statsOf(clock, numTokens ?? message.stats?.numTokens);
}

function endThinking(message, clock) {
  if (clock.thinkMs === null) return;
  message.thinkingMs = (message.thinkingMs ?? 0) + performance.now() - clock.thinkMs;
  clock.thinkMs = null;
}

function statsOf({ startMs, firstMs, lastMs, firstTokens }, numTokens) {
  const stats = { numTokens };
  if (firstMs === null) return stats;
  stats.firstMs = firstMs - startMs;
  const elapsedS = (lastMs - firstMs) / 1000;
  // The first tokens' time is the prefill's; the rate is of those after them. What comes within a
  // frame or two was waiting in a buffer and says nothing about the model.
  if (numTokens > firstTokens && elapsedS > 0.05) {
    stats.tokensPerS = (numTokens - firstTokens) / elapsedS;
  }
  return stats;
}
