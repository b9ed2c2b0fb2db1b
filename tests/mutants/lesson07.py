"""Answers to the tasks of lesson 07."""

from typing import Any

import torch


class Tiles(Any):
    task = "07.1"

    def right_sorted(expert, num_experts, block):
        counts = torch.tensor([expert.tolist().count(e) for e in range(num_experts)])
        each = torch.ceil(counts / block).int()
        start = torch.cat([torch.zeros(1).int(), (each * block).cumsum(0).int()])
        bound = min(len(expert), (len(expert) + num_experts * (block - 1)) // block)
        owner = torch.arange(num_experts).repeat_interleave(each)
        rest = torch.full((bound - len(owner),), num_experts)
        return start, torch.cat([owner, rest])

    def right_one_after_the_other(expert, num_experts, block):
        start, owner = [0], []
        for e in range(num_experts):
            rows = expert.tolist().count(e)
            while rows > 0:
                owner.append(e)
                rows -= block
            start.append(len(owner) * block)
        most = (len(expert) + num_experts * (block - 1)) // block
        owner += [num_experts] * (min(len(expert), most) - len(owner))
        return torch.tensor(start), torch.tensor(owner, dtype=torch.int32)

    def wrong_bound_of_full_tiles(expert, num_experts, block):
        """says: owner has a place for every tile that there may be"""
        start, owner = Tiles.right_sorted(expert, num_experts, block)
        return start, owner[: -(-len(expert) // block)]

    def wrong_as_many_as_there_are(expert, num_experts, block):
        """says: because the host does not know them"""
        start, owner = Tiles.right_sorted(expert, num_experts, block)
        return start, owner[owner < num_experts]

    def wrong_last_first(expert, num_experts, block):
        """says: in another order"""
        start, owner = Tiles.right_sorted(expert, num_experts, block)
        return start, owner.sort(descending=True).values


class Reads(Any):
    task = "07.2"

    def right_as_in_the_kernel(m, n, step, token, owner, num_tokens, C, D, block):
        r = torch.arange(block)
        t = token[m * block + r][:, None]
        k, column, e = step * block + r, (n * block + r)[None, :], owner[m]
        x = t * D + k[None, :]
        weight = (e * C + column) * D + k[:, None]
        return x, (t < num_tokens) & (k < D), weight, (k < D)[:, None] & (column < C)

    def right_flat(m, n, step, token, owner, num_tokens, C, D, block):
        i = torch.arange(block * block)
        first, second = i // block, i % block
        t, k = token[m * block + first], step * block + second
        x, inside = t * D + k, (t < num_tokens) & (k < D)
        k, c = step * block + first, n * block + second
        weight, within = int(owner[m]) * C * D + c * D + k, (k < D) & (c < C)
        # what is masked may be anything
        parts = x.where(inside, 0), inside, weight.where(within, -7), within
        return tuple(part.view(block, block) for part in parts)

    def wrong_mask_of_rows_alone(m, n, step, token, owner, num_tokens, C, D, block):
        """says: A mask has a truth value for each number of the block"""
        x, mask, *rest = Reads.right_as_in_the_kernel(
            m, n, step, token, owner, num_tokens, C, D, block
        )
        return x, mask[:, :1], *rest

    def wrong_no_masks(m, n, step, token, owner, num_tokens, C, D, block):
        """says: do not depend on num_tokens"""
        values = m, n, step, token, owner, num_tokens, C, D, block
        x, mask, weight, _ = Reads.right_as_in_the_kernel(*values)
        return x, torch.ones_like(mask), weight, torch.ones_like(mask)


class Takes(Any):
    task = "07.3"

    def right_in_bits(block_m, block_n, block_k, sums, warps, stages, size):
        held = 32 * block_m * block_n * sums
        way = sum([block_m, *[block_n] * sums]) * block_k * 8 * size * stages
        return held / 32 / (warps * 32), way // 8

    def right_tensors(block_m, block_n, block_k, sums, warps, stages, size):
        sizes = torch.tensor([block_m * block_n * sums / (warps * 32), block_m + sums * block_n])
        return sizes[0], sizes[1].double() * block_k * stages * size

    def wrong_numbers_for_bytes(block_m, block_n, block_k, sums, warps, stages, size):
        """says: the rest is right. There your numbers are right / size in every case"""
        return Takes.right_in_bits(block_m, block_n, block_k, sums, warps, stages, 1)


class Offset(Any):
    task = "07.4"

    def right_widened_first(expert, row, column, C, D):
        return (expert.long() * C + row) * D + column

    def right_in_double(expert, row, column, C, D):
        expert, row, column = expert.double(), row.double(), column.double()
        return (expert * C * D + row * D + column).to(torch.int64)

    def wrong_still_narrow(expert, row, column, C, D):
        """says: Your numbers are right - column in every case"""
        return (expert.long() * C + row) * D

    def wrong_row_of_another(expert, row, column, C, D):
        """says: None of the common mistakes"""
        return (expert.long() * D + row) * C + column
