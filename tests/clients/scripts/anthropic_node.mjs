// anthropic, Node.
import Anthropic from "@anthropic-ai/sdk";
import { API_KEY, ASK, CITIES, HELLO, MODEL, SERVER_URL, WEATHER_SCHEMA, check, feature } from "./report.mjs";

const client = new Anthropic({ baseURL: SERVER_URL, apiKey: API_KEY });
const tools = [{ name: "get_weather", description: "The weather", input_schema: WEATHER_SCHEMA }];
const call = { model: MODEL, messages: ASK, tools, tool_choice: { type: "any" }, max_tokens: 200 };

await feature("chat", async () => {
  const answer = await client.messages.create({ model: MODEL, messages: HELLO, max_tokens: 16 });
  check(answer.content[0].text && answer.usage.output_tokens <= 16, answer);
});

await feature("stream", async () => {
  const stream = client.messages.stream({ model: MODEL, messages: HELLO, max_tokens: 16 });
  let text = "";
  stream.on("text", (piece) => (text += piece));
  check((await stream.finalText()) === text, text);
});

await feature("tools", async () => {
  const answer = await client.messages.create(call);
  check(answer.stop_reason === "tool_use" && CITIES.includes(answer.content.at(-1).input.city), answer);
});

await feature("tools, streamed", async () => {
  const final = await client.messages.stream(call).finalMessage();
  check(CITIES.includes(final.content.at(-1).input.city), final);
});

await feature("count tokens", async () => {
  const counted = await client.messages.countTokens({ model: MODEL, messages: HELLO });
  check(counted.input_tokens > 3, counted);
});

await feature("errors", async () => {
  try {
    await client.messages.create({ model: "other", messages: HELLO, max_tokens: 4 });
  } catch (error) {
    return check(error instanceof Anthropic.NotFoundError, error);
  }
  check(false, "no error");
});
