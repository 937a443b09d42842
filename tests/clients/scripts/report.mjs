// What every script has: the server it is told of, a tool, and `feature`, which reports.

export const { BASE_URL, SERVER_URL, API_KEY, MODEL } = process.env;
export const CITIES = ["Paris", "Rome", "Oslo"];
export const WEATHER_SCHEMA = {
  type: "object",
  properties: { city: { type: "string", enum: CITIES } },
  required: ["city"],
  additionalProperties: false,
};
export const HELLO = [{ role: "user", content: "Say hello." }];
export const ASK = [{ role: "user", content: "What is the weather in Paris?" }];

export async function feature(name, check) {
  try {
    await check();
    console.log(JSON.stringify({ feature: name, ok: true }));
  } catch (error) {
    console.error(error);
    const why = `${error.name}: ${error.message}`.split("\n")[0].slice(0, 300);
    console.log(JSON.stringify({ feature: name, ok: false, why }));
  }
}

export function check(condition, what = "") {
  if (!condition) throw new Error(`not so: ${what}`);
}
