"""Triton kernels of `ssd`: chunks in parallel, but for the one recurrence from chunk to chunk.

With A_t the sum of a chunk's log decays up to token t, A_C that of all, H the state before a chunk,
and w = step u what tokens write:

    y_t = exp(A_t) H c_t + sum_{s <= t} (c_t . b_s) exp(A_t - A_s) w_s + skip u_t     `_outputs`
    H'  = exp(A_C) H + sum_s exp(A_C - A_s) w_s b_s^T                                 `_states`

and with dy and the gradient E of the state behind the chunk, which the same recurrence gives from
the right (exp(A_t) dy_t c_t^T in place of what tokens write), `_gradients` has

    dw_s = exp(A_C - A_s) E b_s + sum_{t >= s} (c_t . b_s) exp(A_t - A_s) dy_t
    db_s = sum_heads exp(A_C - A_s) E^T w_s + sum_{t >= s} (dy_t . w_s) exp(A_t - A_s) c_t
    dc_t = sum_heads exp(A_t) H^T dy_t + sum_{s <= t} (dy_t . w_s) exp(A_t - A_s) b_s
    dl_t = every term that exp(l_t) is a factor of.

Shapes: B batch, T time, H heads, P head width, G groups, N state size, J chunks of C tokens. Heads
of a group share b and c, so that one program runs over several of them: db and dc are summed in
registers, without atomics and in an order that is fixed.

Written for operands of 16 bits, for which differences of sums A within one chunk are near enough. A
weight loses digits as A grows: 4e-5 where tokens decay by up to exp(-10), 7e-4 at the worst, since
log decays below that of 2^-160, which fp32 rounds to 0, count as that one. This also makes a reset
a log decay of minus infinity: documents may begin anywhere.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
ZERO = tl.constexpr(-160.0)  # 2^-160 is 0 in fp32, among subnormals too


class Tiling(NamedTuple):
    """chunk: tokens. heads: most per program. warps, stages: Triton's."""

    chunk: int
    heads: int
    warps: int
    stages: int


OUTPUTS = Tiling(chunk=128, heads=8, warps=8, stages=2)
GRADIENTS = Tiling(chunk=64, heads=32, warps=8, stages=2)
STATE_WARPS, STATE_STAGES = 4, 3
STATE_TILE = 64  # most rows and columns of a state in one program
ENOUGH_PROGRAMS = 256  # of `_states`: some two per multiprocessor


@triton.jit
def _prepare(
    step,
    log_decay,
    steps,
    sums,
    length,
    n_heads,
    chunks,
    step_stride_b,
    step_stride_t,
    step_stride_h,
    decay_stride_b,
    decay_stride_t,
    decay_stride_h,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """(B, T, H) -> (B, H, J * C): steps, and log2 decays summed from the start of a chunk. Behind
    the last token nothing is written and nothing decays."""
    row, j = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    t = j * CHUNK + tl.arange(0, CHUNK)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = (h < n_heads)[None, :]
    here, far = is_head & (t < length)[:, None], t.to(tl.int64)[:, None]
    place = (row * n_heads + h)[None, :] * (chunks * CHUNK) + t[:, None]
    source = step + row * step_stride_b + far * step_stride_t + h[None, :] * step_stride_h
    tl.store(steps + place, tl.load(source, here, 0.0), is_head)
    source = log_decay + row * decay_stride_b + far * decay_stride_t + h[None, :] * decay_stride_h
    power = tl.load(source, here, 0.0) * LOG2_E
    power = tl.where(power < ZERO, ZERO, power)  # a maximum would drop NaN
    tl.store(sums + place, tl.cumsum(power, 0), is_head)


@triton.jit
def _states(
    values,
    keys,
    steps,
    sums,
    start,
    states,
    last,
    length,
    chunks,
    n_heads,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_g,
    per_group: tl.constexpr,
    width: tl.constexpr,
    d_state: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_START: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE: tl.constexpr,
):
    """The states before all chunks, of values u and keys b; in reverse the gradients of the states
    behind all chunks, of values dy and keys c."""
    lane = tl.program_id(0)
    row, head = (lane // n_heads).to(tl.int64), lane % n_heads
    p = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    n = tl.program_id(2) * STATE + tl.arange(0, STATE)
    inside = (p < width)[:, None] & (n < d_state)[None, :]
    place = p[:, None] * d_state + n[None, :]
    own = lane.to(tl.int64) * (width * d_state) + place
    s = tl.zeros([WIDTH, STATE], tl.float32)
    if HAS_START:
        s = tl.load(start + own, inside, 0.0)
    steps += lane.to(tl.int64) * (chunks * CHUNK)
    sums += lane.to(tl.int64) * (chunks * CHUNK)
    values += row * v_stride_b + head * v_stride_h + p[None, :]
    keys += row * k_stride_b + head // per_group * k_stride_g + n[None, :]
    for index in range(chunks):
        j = chunks - 1 - index if REVERSE else index
        t = j * CHUNK + tl.arange(0, CHUNK)
        target = ((row * chunks + j) * n_heads + head) * (width * d_state) + place
        tl.store(states + target, s.to(states.dtype.element_ty), inside)
        here, far = (t < length)[:, None], t.to(tl.int64)[:, None]
        x = tl.load(values + far * v_stride_t, here & (p < width)[None, :], 0.0)
        k = tl.load(keys + far * k_stride_t, here & (n < d_state)[None, :], 0.0)
        passed, all_passed = tl.load(sums + t), tl.load(sums + j * CHUNK + CHUNK - 1)
        weight = tl.exp2(passed if REVERSE else all_passed - passed)
        if not REVERSE:
            weight *= tl.load(steps + t)
        x = tl.trans((x * weight[:, None]).to(k.dtype))
        s = tl.dot(x, k, s * tl.exp2(all_passed))
    tl.store(last + own, s, inside)


@triton.jit
def _outputs(
    u,
    b,
    c,
    skip,
    steps,
    sums,
    before,
    y,
    length,
    chunks,
    n_heads,
    u_stride_b,
    u_stride_t,
    u_stride_h,
    b_stride_b,
    b_stride_t,
    b_stride_g,
    c_stride_b,
    c_stride_t,
    c_stride_g,
    per_group: tl.constexpr,
    width: tl.constexpr,
    d_state: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE: tl.constexpr,
):
    row, j = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    first = tl.program_id(1) * HEADS
    token, p, n = tl.arange(0, CHUNK), tl.arange(0, WIDTH), tl.arange(0, STATE)
    t = j * CHUNK + token
    here, far = (t < length)[:, None], t.to(tl.int64)[:, None]
    is_u, is_bc = here & (p < width)[None, :], here & (n < d_state)[None, :]
    is_state = (p < width)[:, None] & (n < d_state)[None, :]
    group = first // per_group
    b += row * b_stride_b + far * b_stride_t + group * b_stride_g + n[None, :]
    c += row * c_stride_b + far * c_stride_t + group * c_stride_g + n[None, :]
    b_tile, c_tile = tl.load(b, is_bc, 0.0), tl.load(c, is_bc, 0.0)
    scores = tl.dot(c_tile, tl.trans(b_tile))
    causal, same = token[:, None] >= token[None, :], token[:, None] == token[None, :]
    u += row * u_stride_b + far * u_stride_t + p[None, :]
    y += (row * length + far) * (n_heads * width) + p[None, :]
    before += (row * chunks + j) * n_heads * (width * d_state) + p[:, None] * d_state + n[None, :]
    steps += row * n_heads * (chunks * CHUNK) + t
    sums += row * n_heads * (chunks * CHUNK) + t
    for head in range(first, first + HEADS):
        x = tl.load(u + head * u_stride_h, is_u, 0.0)
        state = tl.load(before + head * (width * d_state), is_state, 0.0)
        passed = tl.load(sums + head * (chunks * CHUNK))
        between = tl.where(causal, passed[:, None] - passed[None, :], float("-inf"))
        weights = scores * tl.exp2(between) * tl.load(steps + head * (chunks * CHUNK))[None, :]
        weights += tl.where(same, tl.load(skip + head), 0.0)
        out = tl.dot(c_tile, tl.trans(state)) * tl.exp2(passed)[:, None]
        out = tl.dot(weights.to(x.dtype), x, out)
        tl.store(y + head * width, out.to(y.dtype.element_ty), is_u)


@triton.jit
def _scores(
    b,
    c,
    scores,
    length,
    chunks,
    b_stride_b,
    b_stride_t,
    b_stride_g,
    c_stride_b,
    c_stride_t,
    c_stride_g,
    d_state: tl.constexpr,
    CHUNK: tl.constexpr,
    STATE: tl.constexpr,
):
    """(B, J, G, C, C): b_s . c_t at [s, t]."""
    row, j = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    group, groups = tl.program_id(1), tl.num_programs(1)
    token, n = tl.arange(0, CHUNK), tl.arange(0, STATE)
    t = j * CHUNK + token
    here, far = (t < length)[:, None] & (n < d_state)[None, :], t.to(tl.int64)[:, None]
    b += row * b_stride_b + far * b_stride_t + group * b_stride_g + n[None, :]
    c += row * c_stride_b + far * c_stride_t + group * c_stride_g + n[None, :]
    product = tl.dot(tl.load(b, here, 0.0), tl.trans(tl.load(c, here, 0.0)))
    place = ((row * chunks + j) * groups + group) * (CHUNK * CHUNK)
    tl.store(scores + place + token[:, None] * CHUNK + token[None, :], product)


@triton.jit
def _gradients(
    u,
    dy,
    b,
    c,
    skip,
    scores,
    steps,
    sums,
    before,
    behind,
    du,
    d_step,
    d_log_decay,
    db,
    dc,
    d_skip,
    length,
    chunks,
    n_heads,
    u_stride_b,
    u_stride_t,
    u_stride_h,
    dy_stride_b,
    dy_stride_t,
    dy_stride_h,
    b_stride_b,
    b_stride_t,
    b_stride_g,
    c_stride_b,
    c_stride_t,
    c_stride_g,
    per_group: tl.constexpr,
    width: tl.constexpr,
    d_state: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE: tl.constexpr,
):
    """Matrices between tokens are [s, t] here. What is transposed and when decides how many of
    these tiles the registers hold: the sums of db and dc are (N, C), scores come from memory.
    """
    row, j = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    part, parts = tl.program_id(1), tl.num_programs(1)
    first = part * HEADS
    group, groups = first // per_group, n_heads // per_group
    token, p, n = tl.arange(0, CHUNK), tl.arange(0, WIDTH), tl.arange(0, STATE)
    t = j * CHUNK + token
    here, far = (t < length)[:, None], t.to(tl.int64)[:, None]
    is_u, is_bc = here & (p < width)[None, :], here & (n < d_state)[None, :]
    is_state = (p < width)[:, None] & (n < d_state)[None, :]
    b += row * b_stride_b + far * b_stride_t + group * b_stride_g + n[None, :]
    c += row * c_stride_b + far * c_stride_t + group * c_stride_g + n[None, :]
    b_tile, c_tile = tl.load(b, is_bc, 0.0), tl.load(c, is_bc, 0.0)
    scores += ((row * chunks + j) * groups + group) * (CHUNK * CHUNK)
    causal, same = token[:, None] <= token[None, :], token[:, None] == token[None, :]
    u += row * u_stride_b + far * u_stride_t + p[None, :]
    dy += row * dy_stride_b + far * dy_stride_t + p[None, :]
    du += (row * length + far) * (n_heads * width) + p[None, :]
    d_step += (row * length + t) * n_heads
    d_log_decay += (row * length + t) * n_heads
    d_skip += (row * chunks + j) * n_heads
    state_at = (row * chunks + j) * n_heads * (width * d_state)
    state_at += p[:, None] * d_state + n[None, :]
    steps += row * n_heads * (chunks * CHUNK) + t
    sums += row * n_heads * (chunks * CHUNK) + j * CHUNK
    products = tl.zeros([CHUNK, CHUNK], tl.float32)  # of dy_t and u_s, decayed, of all heads
    db_tile, dc_tile = tl.zeros([STATE, CHUNK], tl.float32), tl.zeros([STATE, CHUNK], tl.float32)
    for head in range(first, first + HEADS):
        x = tl.load(u + head * u_stride_h, is_u, 0.0)
        d = tl.load(dy + head * dy_stride_h, is_u, 0.0)
        before_tile = tl.load(before + state_at + head * (width * d_state), is_state, 0.0)
        behind_tile = tl.load(behind + state_at + head * (width * d_state), is_state, 0.0)
        own = sums + head * (chunks * CHUNK)
        scores_tile = tl.load(scores + token[:, None] * CHUNK + token[None, :])
        passed, all_passed = tl.load(own + token), tl.load(own + CHUNK - 1)
        step, skipped = tl.load(steps + head * (chunks * CHUNK)), tl.load(skip + head)
        between = tl.where(causal, passed[None, :] - passed[:, None], float("-inf"))
        decay, since_start = tl.exp2(between), tl.exp2(passed)
        to_end = tl.exp2(all_passed - passed)

        product = tl.dot(x, tl.trans(d))
        tl.store(d_skip + head, tl.sum(tl.sum(tl.where(same, product, 0.0), 1), 0))
        product *= decay
        products += product * step[:, None]
        # What steps s and outputs t have of each other. A token's own part decays no more, and
        # falls out of the difference.
        shared = scores_tile * product
        of_step = tl.sum(shared, 1)
        d_sum = tl.sum(shared * step[:, None], 0) - of_step * step

        weights = scores_tile * decay * step[:, None] + tl.where(same, skipped, 0.0)
        d_x = tl.dot(b_tile, tl.trans(behind_tile)) * to_end[:, None]
        carried_out = tl.sum(d_x * x, 1)
        tl.store(d_step + head, of_step + carried_out, t < length)
        carried_out *= step
        d_x = d_x * step[:, None] + tl.trans(tl.dot(tl.trans(d), tl.trans(weights.to(x.dtype))))
        tl.store(du + head * width, d_x.to(du.dtype.element_ty), is_u)

        x_end = (x * (to_end * step)[:, None]).to(x.dtype)
        db_tile = tl.dot(tl.trans(behind_tile), tl.trans(x_end), db_tile)
        d_start = (d * since_start[:, None]).to(x.dtype)
        dc_tile = tl.dot(tl.trans(before_tile), tl.trans(d_start), dc_tile)
        # Not from what dc gets, which is N wide and another tile of registers.
        read = tl.dot(c_tile, tl.trans(before_tile))
        carried_in = tl.sum(read * d, 1) * since_start

        # l_t decays what tokens from t on read of H and of earlier tokens, and what of both is kept
        # in the state behind.
        both = tl.dot(before_tile, tl.trans(behind_tile))  # its trace is <H, E>
        through = tl.sum(tl.sum(tl.where(p[:, None] == p[None, :], both, 0.0), 1), 0)
        through = through * tl.exp2(all_passed) + tl.sum(carried_out, 0)
        d_l = tl.cumsum(d_sum + carried_in - carried_out, 0, reverse=True) + through
        tl.store(d_log_decay + head, d_l, t < length)

    product = products.to(b_tile.dtype)
    db_tile = tl.trans(tl.dot(tl.trans(c_tile), tl.trans(product), db_tile))
    dc_tile = tl.trans(tl.dot(tl.trans(b_tile), product, dc_tile))
    share, rows = part % (parts // groups), tl.num_programs(0) // chunks
    place = ((share * rows + row) * length + far) * groups + group
    place = place * d_state + n[None, :]
    tl.store(db + place, db_tile.to(db.dtype.element_ty), is_bc)
    tl.store(dc + place, dc_tile.to(dc.dtype.element_ty), is_bc)


def ssd_forward(
    u: Tensor,
    step: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`ssd` in one piece; a token with a log decay of -inf begins anew.

    Args:
        u: (B, T, H, P).
        step: (B, T, H), fp32.
        log_decay: (B, T, H), fp32.
        b: (B, T, G, N) in the dtype of `u`.
        c: like `b`.
        skip: (H,), fp32.
        state: (B, H, P, N), fp32.

    Returns:
        y like `u`, contiguous, and the state after the last token, (B, H, P, N) in fp32.
    """
    u, b, c = (_rows(x) for x in (u, b, c))
    tiling = _tiling(OUTPUTS, u, b)
    length, n_heads = u.shape[1:3]
    y = u.new_empty(u.shape)
    with torch.cuda.device_of(u):
        steps, sums = _prepared(step, log_decay, tiling.chunk)
        before, last = _chunk_states(u, b, steps, sums, state, tiling.chunk)
        chunks = sums.shape[2] // tiling.chunk
        _outputs[(u.shape[0] * chunks, n_heads // tiling.heads)](
            u,
            b,
            c,
            skip,
            steps,
            sums,
            before,
            y,
            length,
            chunks,
            n_heads,
            *u.stride()[:3],
            *b.stride()[:3],
            *c.stride()[:3],
            HEADS=tiling.heads,
            CHUNK=tiling.chunk,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **_sizes(u, b),
        )
    return y, last


def ssd_backward(
    dy: Tensor,
    d_last: Tensor,
    u: Tensor,
    step: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None,
) -> list[Tensor]:
    """The gradients of all arguments of `ssd_forward`, contiguous, from those of its results."""
    u, dy, b, c = (_rows(x) for x in (u, dy, b, c))
    tiling = _tiling(GRADIENTS, u, b)
    length, n_heads = u.shape[1:3]
    parts = n_heads // tiling.heads
    shares = parts // b.shape[2]  # programs that a group's heads are dealt to
    du, d_step, d_log_decay = (x.new_empty(x.shape) for x in (u, step, log_decay))
    db = b.new_empty(shares, *b.shape, dtype=b.dtype if shares == 1 else torch.float32)
    dc = torch.empty_like(db)
    with torch.cuda.device_of(u):
        steps, sums = _prepared(step, log_decay, tiling.chunk)
        before, _ = _chunk_states(u, b, steps, sums, state, tiling.chunk)
        behind, d_state = _chunk_states(dy, c, steps, sums, d_last, tiling.chunk, reverse=True)
        chunks = sums.shape[2] // tiling.chunk
        d_skip = sums.new_empty(u.shape[0] * chunks, n_heads)
        scores = sums.new_empty(u.shape[0], chunks, b.shape[2], tiling.chunk, tiling.chunk)
        _scores[(u.shape[0] * chunks, b.shape[2])](
            b,
            c,
            scores,
            length,
            chunks,
            *b.stride()[:3],
            *c.stride()[:3],
            d_state=b.shape[3],
            CHUNK=tiling.chunk,
            STATE=_sizes(u, b)["STATE"],
        )
        _gradients[(u.shape[0] * chunks, parts)](
            u,
            dy,
            b,
            c,
            skip,
            scores,
            steps,
            sums,
            before,
            behind,
            du,
            d_step,
            d_log_decay,
            db,
            dc,
            d_skip,
            length,
            chunks,
            n_heads,
            *u.stride()[:3],
            *dy.stride()[:3],
            *b.stride()[:3],
            *c.stride()[:3],
            HEADS=tiling.heads,
            CHUNK=tiling.chunk,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **_sizes(u, b),
        )
    db, dc = (x[0] if shares == 1 else x.sum(0).to(b.dtype) for x in (db, dc))
    return [du, d_step, d_log_decay, db, dc, d_skip.sum(0), d_state]


def _prepared(step: Tensor, log_decay: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """See `_prepare`."""
    batch, length, n_heads = log_decay.shape
    chunks, heads = triton.cdiv(length, chunk), 16
    steps = log_decay.new_empty(batch, n_heads, chunks * chunk)
    sums = torch.empty_like(steps)
    _prepare[(batch * chunks, triton.cdiv(n_heads, heads))](
        step,
        log_decay,
        steps,
        sums,
        length,
        n_heads,
        chunks,
        *step.stride(),
        *log_decay.stride(),
        HEADS=heads,
        CHUNK=chunk,
    )
    return steps, sums


def _chunk_states(
    values: Tensor,
    keys: Tensor,
    steps: Tensor,
    sums: Tensor,
    start: Tensor | None,
    chunk: int,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """(B, J, H, P, N) like `values`, and what the last chunk hands on, (B, H, P, N) in fp32."""
    batch, length, n_heads, width = values.shape
    d_state, chunks = keys.shape[3], sums.shape[2] // chunk
    states = values.new_empty(batch, chunks, n_heads, width, d_state)
    last = sums.new_empty(batch, n_heads, width, d_state)
    sizes = _sizes(values, keys)
    tile_p, tile_n = min(sizes.pop("WIDTH"), STATE_TILE), min(sizes.pop("STATE"), STATE_TILE)
    lanes = batch * n_heads * triton.cdiv(width, tile_p)
    while tile_n > 16 and lanes * triton.cdiv(d_state, tile_n) < ENOUGH_PROGRAMS:
        tile_n //= 2
    _states[(batch * n_heads, triton.cdiv(width, tile_p), triton.cdiv(d_state, tile_n))](
        values,
        keys,
        steps,
        sums,
        start if start is None else start.contiguous(),
        states,
        last,
        length,
        chunks,
        n_heads,
        *values.stride()[:3],
        *keys.stride()[:3],
        REVERSE=reverse,
        HAS_START=start is not None,
        CHUNK=chunk,
        WIDTH=tile_p,
        STATE=tile_n,
        num_warps=STATE_WARPS,
        num_stages=STATE_STAGES,
        **sizes,
    )
    return states, last


def _tiling(tiling: Tiling, u: Tensor, b: Tensor) -> Tiling:
    """Chosen for states of 64 x 128: for larger ones chunks are smaller, to fit the registers; for
    short calls, too. Heads divide a group."""
    sizes = _sizes(u, b)
    excess = max(1, sizes["WIDTH"] // 64) * max(1, sizes["STATE"] // 128)
    heads = min(tiling.heads, sizes["per_group"])
    while sizes["per_group"] % heads:
        heads -= 1
    chunk = min(tiling.chunk // excess, triton.next_power_of_2(u.shape[1]))
    return tiling._replace(chunk=max(16, chunk), heads=heads)


def _sizes(u: Tensor, b: Tensor) -> dict[str, int]:
    """What kernels are compiled for; tiles as products on tensor cores need them."""
    (n_heads, width), (groups, d_state) = u.shape[2:], b.shape[2:]
    return {
        "per_group": n_heads // groups,
        "width": width,
        "d_state": d_state,
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "STATE": max(16, triton.next_power_of_2(d_state)),
    }


def _rows(x: Tensor) -> Tensor:
    """x, or a copy of it, with neighbouring elements in its last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
