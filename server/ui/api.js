// The server's API: JSON, a chat's stream, metrics. The key lives as long as this tab, and goes in a header alone.

const KEY = "nibble.key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const said = body.error?.message ?? body.error ?? response.statusText;
  throw new ApiError(response.status, said);
}

export async function json(path) {
  return (await request(path)).json();
}

// Events of a chat as they come: objects, the last of which has the usage.
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ApiError(500, event.error.message);
      yield event;
    }
  }
}

// Prometheus text: name -> sum of its samples; name -> [[le, count]] of its buckets.
export async function metrics() {
  const values = new Map();
  const buckets = new Map();
  for (const line of (await (await request("/metrics")).text()).split("\n")) {
    const found = /^(nibble_\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found) continue;
    const [, name, labels = "", value] = found;
    const le = /le="([^"]+)"/.exec(labels)?.[1];
    if (le) {
      if (!buckets.has(name)) buckets.set(name, []);
      buckets.get(name).push([le === "+Inf" ? Infinity : Number(le), Number(value)]);
    } else {
      values.set(name, (values.get(name) ?? 0) + Number(value));
    }
  }
  return { values, buckets };
}
