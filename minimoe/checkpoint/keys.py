"""Where a tensor of the model lies in a folder.

transformers' layout, below `model.layers.{l}.` unless a name is given whole; e counts experts, F is their width:

    here                                       on disk: Mixtral               OLMoE, Qwen2-MoE, Qwen3-MoE
    embed_tokens.weight, norm.weight           model.embed_tokens.weight, model.norm.weight
    lm_head.weight                             lm_head.weight; left out where it is tied to the embedding
    self_attn.*, *_layernorm.weight            the same
    mlp.gate.weight              [E, D]        block_sparse_moe.gate.weight   mlp.gate.weight
    mlp.experts.gate_up_proj[e, :F]            block_sparse_moe.experts.      mlp.experts.
                                                 {e}.w1.weight                  {e}.gate_proj.weight    [F, D]
    mlp.experts.gate_up_proj[e, F:]              {e}.w3.weight                  {e}.up_proj.weight      [F, D]
    mlp.experts.down_proj[e]                     {e}.w2.weight                  {e}.down_proj.weight    [D, F]
    mlp.shared_experts.mlp.gate_up_proj[:F']   -                              mlp.shared_expert.gate_proj.weight
    mlp.shared_experts.mlp.gate_up_proj[F':]   -                              mlp.shared_expert.up_proj.weight
    mlp.shared_experts.mlp.down_proj           -                              mlp.shared_expert.down_proj.weight
    mlp.shared_experts.gate.weight [1, D]      -                              mlp.shared_expert_gate.weight
    mlp.gate_up_proj[:F''], [F'':], mlp.down_proj, of a dense layer           mlp.{gate,up,down}_proj.weight

Dense families (Mistral, Llama, Qwen2, Qwen3) have the last row in every layer. With the experts fused
(`save_original_format=False` in transformers 5) the router and the experts have the names and shapes that they have
here.
"""

from __future__ import annotations

from minimoe.checkpoint.families import Family

# a tensor on disk, and the part of the model's tensor that it is: tensor[index]
Place = tuple[str, tuple[int | slice, ...]]


def places(
    name: str, shape: tuple[int, ...], family: Family | None, *, fused: bool = False
) -> list[Place]:
    """The tensors on disk that make up the model's tensor `name`; family None: minimoe's own layout, one to one."""
    if family is None:
        return [(name, ())]
    if name == "lm_head.weight":
        return [(name, ())]
    key = f"model.{name}"
    key = key.replace(".mlp.shared_experts.gate.", ".mlp.shared_expert_gate.")
    key = key.replace(".mlp.shared_experts.mlp.", ".mlp.shared_expert.")
    if not fused:
        key = key.replace(".mlp.", f".{family.block}.")
    owner, _, last = key.rpartition(".")
    stacked = owner.endswith(".experts")
    if last not in ("gate_up_proj", "down_proj") or (stacked and fused):
        return [(key, ())]
    gate, up, down = family.projections
    found: list[Place] = []
    for e in range(shape[0]) if stacked else (None,):
        prefix, at = (owner, ()) if e is None else (f"{owner}.{e}", (e,))
        if last == "down_proj":
            found.append((f"{prefix}.{down}.weight", at))
        else:
            f = shape[-2] // 2
            found.append((f"{prefix}.{gate}.weight", (*at, slice(None, f))))
            found.append((f"{prefix}.{up}.weight", (*at, slice(f, None))))
    return found


def find_places(
    name: str, shape: tuple[int, ...], family: Family | None, names: set[str]
) -> list[Place]:
    """`places` in the layout that the folder has, which holds tensors of these names."""
    fused = places(name, shape, family, fused=True)
    return fused if fused[0][0] in names else places(name, shape, family)
