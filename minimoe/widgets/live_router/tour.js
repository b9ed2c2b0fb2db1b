// A tour of six steps: each puts the controls somewhere, and says what is there to be seen, from what the model has found.

// Of the tokens that stood in the text before, how many have the same first expert at a layer as then: [of them, all].
export function again(bytes, choices, layer) {
  const before = new Map();
  let [same, all] = [0, 0];
  bytes.forEach((spelling, t) => {
    const [key, expert] = [String(spelling), choices[t][layer].experts[0]];
    if (before.has(key)) {
      all += 1;
      same += before.get(key) === expert ? 1 : 0;
    } else before.set(key, expert);
  });
  return [same, all];
}

const REPEATED = "The river is cold. The water of the river is cold, and the sea is cold. The king of the sea is old.";

// [title, what the controls say, what is said of `found`] of each step.
export const TOUR = [
  ["One token", { example: 0, layer: 1, token: 1 }, ({ tokens, choices }) => {
    const { experts, weights } = choices[1][0];
    return `Look at the token “${tokens[1].text}”. At layer 1 the router gives each of ${choices[1][0].probs.length} experts a probability, and the two largest read the token: expert ${experts[0] + 1} with weight ${percent(weights[0])}, expert ${experts[1] + 1} with ${percent(weights[1])}. The table has the same for every layer.`;
  }],
  ["Layer 1 is a dictionary", { text: REPEATED, layer: 1, token: 1 }, ({ bytes, choices }) => {
    const [same, all] = again(bytes, choices, 0);
    return `Here ${all} tokens are repeated. At layer 1, ${same} of them have the same first expert as where they stood before: the router looks a token up, almost as in a dictionary, whatever stands around it.`;
  }],
  ["Later layers look around", { text: REPEATED, layer: 6, token: 1 }, ({ bytes, choices }) => {
    const [[first, all], [last]] = [again(bytes, choices, 0), again(bytes, choices, choices[0].length - 1)];
    return `The same text at the last layer: now ${last} of the ${all} repeated tokens have the same first expert as before; at layer 1 it was ${first}. Attention has mixed into each token what stands before it. Move the layer back and forth.`;
  }],
  ["Another language", { example: 1, layer: 6, token: 0 }, ({ load, domains }) => {
    const far = (name) => percent(apart(load.at(-1), domains.find((domain) => domain.name === name).load.at(-1)));
    return `French, on the same subject. At the last layer ${far("wiki_fr")} of the choices would have to change to give the load of the French encyclopaedia, and ${far("wiki_en")} for the English one. Compare with other domains, and with the recipe or the code.`;
  }],
  ["What comes next", { example: 0, layer: 6, token: 0, temperature: 0.5 }, ({ logits }) => {
    const [calm, plain, hot] = [0.5, 1, 2].map((temperature) => percent(Math.max(...distribution(logits, temperature)), 1));
    return `After the text the model gives each of ${logits.length.toLocaleString("en")} tokens a probability. The likeliest has ${plain} at temperature 1, ${calm} at 0.5 and ${hot} at 2. Turn the temperature, and press a token to write it.`;
  }],
  ["Without an expert", { example: 0, layer: 6, token: 0, without: true }, ({ plain, costs, only }) => {
    if (!plain || !only) return "The text is read twice: as trained, and without the expert that it uses most.";
    const [before, now] = [plain, costs].map((all) => sum(all) / all.length);
    return `The expert that this text uses most at the last layer is switched off: its tokens go to their next best. The text costs ${now.toFixed(2)} nats per token, and ${before.toFixed(2)} as trained. Force an expert instead, choose another layer, or all of them.`;
  }],
];
