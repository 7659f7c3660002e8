// What llama.cpp makes of prompts: node continue.mjs MODEL.gguf COUNT PROMPT...
// Prints a line of JSON for each: its token ids, and the text of COUNT most likely tokens after it.
import { getLlama } from "node-llama-cpp";

const [modelPath, count, ...prompts] = process.argv.slice(2);
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext();
for (const prompt of prompts) {
    const sequence = context.getSequence();
    const ids = model.tokenize(prompt);
    const found = [];
    for await (const token of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
        if (model.isEogToken(token)) break;
        found.push(token);
        if (found.length == count) break;
    }
    console.log(JSON.stringify({ prompt: ids, text: model.detokenize(found) }));
    sequence.dispose();
}
process.exit(0);
