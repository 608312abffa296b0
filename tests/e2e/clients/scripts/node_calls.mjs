// Calls of OpenAI's and Anthropic's clients for Node. Prints their results as JSON.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const url = process.argv[2];
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const anthropic = new Anthropic({ baseURL: url, apiKey: "none" });
const usual = {
  model: "talker",
  messages: [{ role: "user", content: "Name the capital of France." }],
  temperature: 0,
  max_tokens: 12,
};

async function failure(call, code) {
  try {
    await call();
  } catch (error) {
    return `${error.constructor.name} ${code(error)}`;
  }
}

async function text(stream, part) {
  let found = "";
  for await (const event of stream) found += part(event) ?? "";
  return found;
}

const found = {
  "openai chat": (await openai.chat.completions.create(usual)).choices[0].message.content,
  "openai stream": await text(
    await openai.chat.completions.create({ ...usual, stream: true }),
    (chunk) => chunk.choices[0]?.delta.content,
  ),
  "openai unknown model": await failure(
    () => openai.chat.completions.create({ ...usual, model: "nobody" }),
    (error) => error.code,
  ),
  "anthropic message": (await anthropic.messages.create(usual)).content[0].text,
  "anthropic stream": await text(
    await anthropic.messages.create({ ...usual, stream: true }),
    (event) => event.delta?.text,
  ),
  "anthropic unknown model": await failure(
    () => anthropic.messages.create({ ...usual, model: "nobody" }),
    (error) => error.error.error.type,
  ),
};
console.log(JSON.stringify(found));
