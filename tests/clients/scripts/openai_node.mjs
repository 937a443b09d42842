// openai, Node.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { API_KEY, ASK, BASE_URL, CITIES, HELLO, MODEL, WEATHER_SCHEMA, check, feature } from "./report.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY });
const tool = { type: "function", function: { name: "get_weather", parameters: WEATHER_SCHEMA } };

await feature("chat", async () => {
  const answer = await client.chat.completions.create({ model: MODEL, messages: HELLO, max_tokens: 16 });
  check(answer.choices[0].message.content && answer.usage.completion_tokens <= 16, answer);
});

await feature("stream", async () => {
  const stream = client.chat.completions.stream({ model: MODEL, messages: HELLO, max_tokens: 16 });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
  check((await stream.finalContent()) === text, text);
});

await feature("tools, streamed", async () => {
  const asked = { model: MODEL, messages: ASK, tools: [tool], tool_choice: "required", max_tokens: 200 };
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  const call = final.choices[0].message.tool_calls[0];
  check(CITIES.includes(JSON.parse(call.function.arguments).city), call);
});

await feature("tools, run by the client", async () => {
  let asked = null;
  const run = {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city",
      parameters: WEATHER_SCHEMA,
      parse: JSON.parse,
      function: async ({ city }) => ((asked = city), "sunny, 20 degrees"),
    },
  };
  const runner = client.chat.completions.runTools(
    {
      model: MODEL,
      messages: ASK,
      tools: [run],
      tool_choice: { type: "function", function: { name: "get_weather" } },
      max_tokens: 100,
    },
    { maxChatCompletions: 1 },
  );
  await runner.done();
  check(CITIES.includes(asked), asked);
});

await feature("JSON schema, parsed", async () => {
  const form = zodResponseFormat(z.object({ city: z.enum(CITIES), degrees: z.number().int() }), "weather");
  const asked = { model: MODEL, messages: ASK, response_format: form, max_tokens: 300 };
  const answer = await client.chat.completions.parse(asked);
  check(CITIES.includes(answer.choices[0].message.parsed.city), answer);
});

await feature("responses, streamed", async () => {
  const stream = client.responses.stream({ model: MODEL, input: "Say hello.", max_output_tokens: 16 });
  let text = "";
  for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
  check((await stream.finalResponse()).output_text === text, text);
});

await feature("embeddings", async () => {
  const answer = await client.embeddings.create({ model: MODEL, input: ["one", "two"] });
  check(answer.data.length === 2 && answer.data[0].embedding.length === 576, answer.usage);
});

await feature("errors", async () => {
  try {
    await client.chat.completions.create({ model: "other", messages: HELLO });
  } catch (error) {
    return check(error instanceof OpenAI.NotFoundError, error);
  }
  check(false, "no error");
});
