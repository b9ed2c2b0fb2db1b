// The shipped model, token by token: embedding, RMSNorm, attention with rotary positions, top-k router, SwiGLU experts,
// and the embedding again as output projection. Products are summed in float64; every result is stored in float32, where PyTorch stores it too.

// safetensors -> {config, tensors by name}: float32 for bf16 and float32, everything else in its own type.
export function readWeights(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const types = { F32: Float32Array, BF16: Uint16Array, I8: Int8Array, U16: Uint16Array, I32: Int32Array };
  const tensors = {};
  for (const [name, { dtype, data_offsets }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [type, [from, to]] = [types[dtype], data_offsets];
    const values = new type(buffer, 8 + length + from, (to - from) / type.BYTES_PER_ELEMENT);
    tensors[name] = dtype === "BF16" ? fromBfloat16(values) : values;
  }
  return { config: JSON.parse(header.__metadata__.config), tensors };
}

// bf16 is the upper half of a float32.
function fromBfloat16(bits) {
  const words = new Uint32Array(bits.length);
  for (let i = 0; i < bits.length; i += 1) words[i] = bits[i] << 16;
  return new Float32Array(words.buffer);
}

// ŵ = q · scale for q [rows · n] and scale [rows], as minimoe.experts_int8.dequantize computes it, in float32.
function unpack(q, scale) {
  const n = q.length / scale.length;
  const weight = new Float32Array(q.length);
  for (let row = 0, i = 0; row < scale.length; row += 1) {
    for (const end = i + n; i < end; i += 1) weight[i] = q[i] * scale[row];
  }
  return weight;
}

// y = W x: rows [at, at + y.length) of a matrix [·, n] times x [n], into y.
function multiply(y, weight, at, x) {
  const n = x.length;
  for (let row = 0, w = at * n; row < y.length; row += 1) {
    let [a, b, c, d] = [0, 0, 0, 0]; // four sums, so that one addition need not wait for the other
    for (let i = 0; i < n; i += 4, w += 4) {
      a += weight[w] * x[i];
      b += weight[w + 1] * x[i + 1];
      c += weight[w + 2] * x[i + 2];
      d += weight[w + 3] * x[i + 3];
    }
    y[row] = a + b + (c + d);
  }
}

// x / sqrt(mean(x²) + ε) · weight, into y.
function rmsNorm(y, x, weight, eps) {
  let squares = 0;
  for (let i = 0; i < x.length; i += 1) squares += x[i] * x[i];
  const scale = 1 / Math.sqrt(squares / x.length + eps);
  for (let i = 0; i < x.length; i += 1) y[i] = x[i] * scale * weight[i];
}

// Turns the pairs (i, i + d/2) of each head of size d in x by position · θ^(−2i/d); angles in float32, as in PyTorch.
function rotate(x, head, position, theta) {
  const half = head / 2;
  for (let i = 0; i < half; i += 1) {
    const angle = Math.fround(position * Math.fround(theta ** -Math.fround(i / half)));
    const [cos, sin] = [Math.fround(Math.cos(angle)), Math.fround(Math.sin(angle))];
    for (let at = i; at < x.length; at += head) {
      const [a, b] = [x[at], x[at + half]];
      x[at] = a * cos - b * sin;
      x[at + half] = b * cos + a * sin;
    }
  }
}

// Σ_s weights[s] · row s of a matrix [·, n].
function weighted(weights, matrix, n) {
  const total = new Float64Array(n);
  for (let s = 0, at = 0; s < weights.length; s += 1) {
    for (let i = 0; i < n; i += 1, at += 1) total[i] += weights[s] * matrix[at];
  }
  return total;
}

// logits -> their softmax, in place.
function softmax(x) {
  const n = x.length;
  let highest = -Infinity;
  for (let i = 0; i < n; i += 1) highest = Math.max(highest, x[i]);
  let total = 0;
  for (let i = 0; i < n; i += 1) total += x[i] = Math.exp(x[i] - highest);
  for (let i = 0; i < n; i += 1) x[i] /= total;
}

export class Model {
  constructor({ config, tensors }) {
    const c = config;
    this.config = c;
    this.head = c.head_dim ?? c.hidden_size / c.num_attention_heads;
    const cache = () =>
      Array.from({ length: c.num_key_value_heads }, () => new Float32Array(c.max_position_embeddings * this.head));
    this.embedding = tensors["embed_tokens.weight"];
    this.layers = Array.from({ length: c.num_hidden_layers }, (_, l) => {
      const named = (name) => tensors[`layers.${l}.${name}`];
      const experts = (name) => unpack(named(`mlp.experts.${name}_proj`), named(`mlp.experts.${name}_scale`));
      return {
        inputNorm: named("input_layernorm.weight"),
        postNorm: named("post_attention_layernorm.weight"),
        ...Object.fromEntries(["q", "k", "v", "o"].map((p) => [p, named(`self_attn.${p}_proj.weight`)])),
        gate: named("mlp.gate.weight"),
        gateUp: experts("gate_up"),
        down: experts("down"),
        keys: cache(), // of each key/value head, [S, d]
        values: cache(),
      };
    });
    this.norm = tensors["norm.weight"];
    this.tokens = []; // those that have been read; position, keys and values go with them
    this.only = null; // experts that may be chosen, by layer: those of a layer that it does not name are all there
    this.logits = new Float32Array(c.max_position_embeddings * c.vocab_size); // [S, V], of the token after each
    this.probs = new Float32Array(c.max_position_embeddings * c.num_hidden_layers * c.num_experts);
    const f = this.layers[0].down.length / (c.num_experts * c.hidden_size);
    const sizes = {
      x: c.hidden_size, h: c.hidden_size, out: c.hidden_size, q: c.num_attention_heads * this.head,
      mixed: c.num_attention_heads * this.head, k: c.num_key_value_heads * this.head, v: c.num_key_value_heads * this.head,
      gateUp: 2 * f, inner: f,
    };
    this.room = Object.fromEntries(Object.entries(sizes).map(([name, size]) => [name, new Float32Array(size)]));
    this.scores = new Float32Array(c.max_position_embeddings);
  }

  // Forget all tokens after the first `count`.
  keep(count) {
    this.tokens.length = count;
  }

  // Let only these experts be chosen, {layer: [experts]} from 0; null: all. What was read with others is forgotten.
  allow(only) {
    if (JSON.stringify(only) !== JSON.stringify(this.only)) this.keep(0);
    this.only = only;
  }

  // Nats that the token at a position cost, from the logits of the position before.
  cost(position) {
    const v = this.config.vocab_size;
    const logits = this.logits.subarray((position - 1) * v, position * v);
    let highest = -Infinity;
    for (let i = 0; i < v; i += 1) highest = Math.max(highest, logits[i]);
    let total = 0;
    for (let i = 0; i < v; i += 1) total += Math.exp(logits[i] - highest);
    return Math.log(total) + highest - logits[this.tokens[position]];
  }

  // Read one more token; its probabilities [L, E] are in `probs` then, at [position, layer], and what may come next in
  // `logits`.
  read(token) {
    const { config: c, room } = this;
    const d = c.hidden_size;
    const position = this.tokens.length;
    room.x.set(this.embedding.subarray(token * d, (token + 1) * d));
    this.layers.forEach((layer, l) => {
      rmsNorm(room.h, room.x, layer.inputNorm, c.rms_norm_eps);
      this.attend(layer, position);
      for (let i = 0; i < d; i += 1) room.x[i] += room.out[i];
      rmsNorm(room.h, room.x, layer.postNorm, c.rms_norm_eps);
      const at = (position * c.num_hidden_layers + l) * c.num_experts;
      const probs = this.probs.subarray(at, at + c.num_experts);
      multiply(probs, layer.gate, 0, room.h);
      const allowed = this.only?.[l];
      if (allowed) for (let e = 0; e < probs.length; e += 1) if (!allowed.includes(e)) probs[e] = -Infinity;
      softmax(probs);
      this.mix(layer, choose(probs, c.num_experts_per_tok));
    });
    rmsNorm(room.h, room.x, this.norm, c.rms_norm_eps);
    multiply(this.logits.subarray(position * c.vocab_size, (position + 1) * c.vocab_size), this.embedding, 0, room.h);
    this.tokens.push(token);
  }

  // Causal grouped-query attention of room.h over itself and all before it, into room.out.
  attend(layer, position) {
    const { config: c, room, head } = this;
    const group = c.num_attention_heads / c.num_key_value_heads;
    const scores = this.scores.subarray(0, position + 1);
    const part = (x, n) => x.subarray(n * head, (n + 1) * head);
    multiply(room.q, layer.q, 0, room.h);
    rotate(room.q, head, position, c.rope_theta);
    multiply(room.k, layer.k, 0, room.h);
    rotate(room.k, head, position, c.rope_theta);
    multiply(room.v, layer.v, 0, room.h);
    for (let n = 0; n < c.num_key_value_heads; n += 1) {
      layer.keys[n].set(part(room.k, n), position * head);
      layer.values[n].set(part(room.v, n), position * head);
    }
    for (let n = 0; n < c.num_attention_heads; n += 1) {
      const [keys, values] = [layer.keys, layer.values].map((cache) => cache[Math.floor(n / group)]);
      multiply(scores, keys, 0, part(room.q, n));
      for (let s = 0; s <= position; s += 1) scores[s] /= Math.sqrt(head);
      softmax(scores);
      part(room.mixed, n).set(weighted(scores, values, head));
    }
    multiply(room.out, layer.o, 0, room.mixed);
  }

  // Adds to room.x what the chosen experts make of room.h: Σ weight · (silu(gate) ⊙ up) W_downᵀ.
  mix(layer, { experts, weights }) {
    const { room } = this;
    const [d, f] = [room.out.length, room.inner.length];
    const sum = new Float64Array(d);
    experts.forEach((expert, k) => {
      multiply(room.gateUp, layer.gateUp, expert * 2 * f, room.h);
      for (let i = 0; i < f; i += 1) {
        const gate = room.gateUp[i];
        room.inner[i] = (gate / (1 + Math.exp(-gate))) * room.gateUp[f + i];
      }
      multiply(room.out, layer.down, expert * d, room.inner);
      for (let i = 0; i < d; i += 1) sum[i] += weights[k] * room.out[i];
    });
    for (let i = 0; i < d; i += 1) room.x[i] += sum[i];
  }
}

// The k largest of probs [E], the first choice first, and their weights, renormalised: {experts [k], weights [k]}.
export function choose(probs, k) {
  const experts = Array.from(probs.keys()).sort((a, b) => probs[b] - probs[a] || a - b).slice(0, k);
  const total = Math.fround(experts.reduce((sum, e) => sum + probs[e], 0));
  return { experts, weights: experts.map((e) => Math.fround(probs[e] / total)) };
}

// Reads texts for the page, {text, only, ...}: post({what was asked, tokens, probs, costs, logits, ...}) as each is done. A newer one
// ends the reading of an older one, and what both begin with is not read again. Works in slices of so many milliseconds:
// on a page short ones, so that it stays alive. After each slice it calls `pausing`.
export function reader(buffer, post, slice, pausing = () => {}) {
  const { config, tensors } = readWeights(buffer);
  const tokenizer = new Tokenizer(tensors);
  const model = new Model({ config, tensors });
  const size = config.num_hidden_layers * config.num_experts;
  let newest = 0;
  return async (asked) => {
    const { text, only = null } = asked;
    const job = (newest += 1);
    const limit = config.max_position_embeddings - 1;
    const found = tokenizer.encode(text, limit + 1);
    const tokens = found.slice(0, limit);
    const ids = [config.end_of_text, ...tokens]; // as in training, where every text comes after the end of another
    model.allow(only);
    let same = 0;
    while (same < model.tokens.length && same < ids.length && model.tokens[same] === ids[same]) same += 1;
    model.keep(same);
    let began = performance.now();
    for (const id of ids.slice(same)) {
      model.read(id);
      if (performance.now() - began > slice) {
        pausing();
        await new Promise((done) => setTimeout(done));
        if (job !== newest) return;
        began = performance.now();
      }
    }
    const bytes = tokens.map((token) => tokenizer.spelling[token]);
    const costs = tokens.map((_, t) => model.cost(t + 1));
    const logits = model.logits.slice((ids.length - 1) * config.vocab_size, ids.length * config.vocab_size);
    const next = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]).slice(0, 8);
    post({
      ...asked, only, tokens, bytes, cut: found.length > limit, probs: model.probs.slice(size, ids.length * size), costs, logits,
      next: next.map((token) => ({ token, bytes: tokenizer.spelling[token] })), // the likeliest tokens after the text
    });
  };
}
