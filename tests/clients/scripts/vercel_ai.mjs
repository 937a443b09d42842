// The Vercel AI SDK, by its OpenAI-compatible provider.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";
import { API_KEY, BASE_URL, CITIES, MODEL, check, feature } from "./report.mjs";

const provider = createOpenAICompatible({
  name: "nibble",
  baseURL: BASE_URL,
  apiKey: API_KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider(MODEL);
const weather = tool({
  description: "The weather in a city",
  inputSchema: z.object({ city: z.enum(CITIES) }),
  execute: async ({ city }) => `sunny in ${city}`,
});

await feature("chat", async () => {
  const { text, usage } = await generateText({ model, prompt: "Say hello.", maxOutputTokens: 16 });
  check(text && usage.outputTokens, usage);
});

await feature("stream", async () => {
  const { textStream, usage } = streamText({ model, prompt: "Say hello.", maxOutputTokens: 16 });
  let text = "";
  for await (const piece of textStream) text += piece;
  check(text && (await usage).outputTokens, text);
});

await feature("tools", async () => {
  const asked = { model, prompt: "The weather in Paris?", tools: { weather }, toolChoice: "required" };
  const { toolResults } = await generateText({ ...asked, maxOutputTokens: 200 });
  check(toolResults[0].output.startsWith("sunny"), toolResults);
});

await feature("tools, streamed", async () => {
  const choice = { type: "tool", toolName: "weather" };
  const asked = { model, prompt: "The weather in Paris?", tools: { weather }, toolChoice: choice };
  const results = await streamText({ ...asked, maxOutputTokens: 200 }).toolResults;
  check(results[0].output.startsWith("sunny"), results);
});

await feature("structured output", async () => {
  const schema = z.object({ city: z.enum(CITIES), degrees: z.number().int() });
  const { object } = await generateObject({ model, schema, prompt: "Paris?", maxOutputTokens: 300 });
  check(CITIES.includes(object.city), object);
});

await feature("embeddings", async () => {
  const embedder = provider.textEmbeddingModel(MODEL);
  const { embeddings } = await embedMany({ model: embedder, values: ["one", "two"] });
  check(embeddings.length === 2 && embeddings[0].length === 576, embeddings.length);
});
