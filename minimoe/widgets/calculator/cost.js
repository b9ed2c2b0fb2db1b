// The arithmetic of minimoe.cost, on a model's configuration: a plain object with the names of ModelConfig.

const headSize = (c) => c.head_dim ?? Math.floor(c.hidden_size / c.num_attention_heads);
const expertSize = (c) => c.moe_intermediate_size ?? c.intermediate_size;
const sparseLayers = (c) => c.num_hidden_layers - new Set(c.mlp_only_layers).size;

const COMPONENTS = ["embedding", "attention", "router", "experts", "shared_experts", "mlp", "norms", "head"];

const kind = (component, kind, size, { copies = 1, used = 1, layers = 1 } = {}) => ({ component, kind, size, copies, used, layers });

// Gated MLPs: three matrices D × F, and with biases 2F + D numbers more.
function mlps(component, c, width, count) {
  return [
    kind(component, "matrix", 3 * c.hidden_size * width, count),
    kind(component, "vector", c.mlp_bias && width > 0 ? 2 * width + c.hidden_size : 0, count),
  ];
}

function attentionWeights(c) {
  const [d, layers, size] = [c.hidden_size, c.num_hidden_layers, headSize(c)];
  const [heads, kv] = [c.num_attention_heads, c.num_key_value_heads];
  let matrix = d * (heads + 2 * kv) * size + heads * size * d;
  let bias = (heads + 2 * kv) * size;
  let norm = { head: 2 * size, full: (heads + kv) * size }[c.qk_norm] ?? 0;
  const [copies, used] = [c.attention_num_experts, c.attention_num_experts_per_tok];
  let experts = [];
  if (c.attention_type === "mla") {
    const [rank, nope, rope, value] = [c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim];
    const [down, queries] = [c.q_lora_rank, heads * (nope + rope)];
    matrix = down === null ? d * queries : d * down + down * queries;
    matrix += d * (rank + rope) + rank * heads * (nope + value) + heads * value * d;
    bias = (down ?? 0) + rank + rope;
    norm = (down ?? 0) + rank;
  } else if (c.attention_type === "switchhead") {
    matrix = (heads + kv) * (d * size + copies * d); // queries, keys and gates; an expert makes values or outputs
    experts = [kind("attention", "matrix", d * size, { copies, used, layers: layers * (heads + kv) })];
  } else if (c.attention_type === "moa") {
    matrix = 2 * d * kv * size + copies * d; // keys, values and gate; an expert is kv heads, their queries and outputs
    experts = [kind("attention", "matrix", 2 * d * kv * size, { copies, used, layers })];
  } else if (c.attention_type !== "gqa") throw new Error(`it has no arithmetic for attention of type ${c.attention_type}`);
  const vector = (c.attention_bias ? bias : 0) + (c.attention_output_bias ? d : 0) + (c.attention_sinks ? heads : 0);
  return [
    kind("attention", "matrix", matrix, { layers }),
    kind("attention", "vector", vector, { layers }),
    ...experts,
    kind("norms", "vector", norm, { layers }),
  ];
}

// Everything that the model holds, as minimoe.cost.weights lists it.
export function weights(c) {
  if (!["top_k", "sigmoid"].includes(c.router_type)) throw new Error(`it has no arithmetic for the router ${c.router_type}`);
  const [d, e, layers] = [c.hidden_size, c.num_experts, sparseLayers(c)];
  const shared = c.n_shared_experts * (c.shared_expert_intermediate_size ?? expertSize(c));
  return [
    ...attentionWeights(c),
    kind("router", "matrix", e * d, { layers }),
    kind("router", "vector", c.router_bias ? e : 0, { layers }),
    ...mlps("experts", c, expertSize(c), { copies: e, used: c.num_experts_per_tok, layers }),
    ...mlps("shared_experts", c, shared, { layers }),
    kind("shared_experts", "matrix", c.shared_expert_gate ? d : 0, { layers }),
    ...mlps("mlp", c, c.intermediate_size, { layers: c.num_hidden_layers - layers }),
    kind("norms", "vector", d, { layers: 2 * c.num_hidden_layers + 1 }),
    ...(c.tie_word_embeddings
      ? [kind("embedding", "matrix", c.vocab_size * d)]
      : [kind("embedding", "table", c.vocab_size * d), kind("head", "matrix", c.vocab_size * d)]),
  ].filter((w) => w.layers * w.copies * w.size > 0);
}

// Parameters held and used by a token: {total, active, parts: {component: {total, active}}}.
export function parameters(c) {
  const parts = {};
  for (const component of COMPONENTS) {
    const own = weights(c).filter((w) => w.component === component);
    if (!own.length) continue;
    parts[component] = {
      total: sum(own.map((w) => w.layers * w.copies * w.size)),
      active: sum(own.map((w) => w.layers * w.used * w.size)),
    };
  }
  const counts = Object.values(parts);
  return { total: sum(counts.map((count) => count.total)), active: sum(counts.map((count) => count.active)), parts };
}

// Tokens that layer i looks back at: all S, or its window.
function windowOf(c, layer, context) {
  const sliding = !c.layer_types.length || c.layer_types[layer] === "sliding_attention";
  return Math.min(context, (sliding ? c.sliding_window : null) ?? context);
}

// FLOPs of a token, forward, by component: in the mean over a sequence of S tokens, or (`decode`) of its last alone.
export function flops(c, context, { decode = false } = {}) {
  const found = {};
  for (const w of weights(c)) {
    if (w.kind !== "matrix") continue;
    const name = w.component === "embedding" ? "head" : w.component;
    found[name] = (found[name] ?? 0) + 2 * w.layers * w.used * w.size;
  }
  let width = 2 * headSize(c);
  if (c.attention_type === "mla") {
    const [rank, rope] = [c.kv_lora_rank, c.qk_rope_head_dim];
    width = decode ? 2 * rank + rope : c.qk_nope_head_dim + rope + c.v_head_dim;
  }
  let keys = 0;
  for (let layer = 0; layer < c.num_hidden_layers; layer += 1) {
    const w = windowOf(c, layer, context);
    keys += decode ? w : ((w * (w + 1)) / 2 + (context - w) * w) / context;
  }
  found.attention_scores = keys * 2 * c.num_attention_heads * width;
  return found;
}

// Matrices of attention weights, S by S each: one for each head that a token computes, in all layers.
export const matrices = (c) => c.num_attention_heads * c.num_hidden_layers;

// Bytes that one sequence of S tokens keeps in the key/value cache.
export function cacheBytes(c, context, bytes = 2) {
  const width = c.attention_type === "mla" ? c.kv_lora_rank + c.qk_rope_head_dim : 2 * c.num_key_value_heads * headSize(c);
  let keys = 0;
  for (let layer = 0; layer < c.num_hidden_layers; layer += 1) keys += windowOf(c, layer, context);
  return keys * width * bytes;
}

// The usual estimate of training, 6·N·tokens, in FLOPs, hours of one device and days of several.
export function training(c, { tokens, peak, utilisation, gpus }) {
  const all = 6 * parameters(c).active * tokens;
  const hours = all / (peak * utilisation) / 3600;
  return { flops: all, hours, days: hours / gpus / 24 };
}
