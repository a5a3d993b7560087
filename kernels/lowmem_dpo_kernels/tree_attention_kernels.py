"""The kernels of `tree_attention`: a forward pass, the queries' gradient, the keys' gradient.

A program takes one tile of one head, holds it in registers, and goes over what it sees in two
loops: tiles that it sees whole, then those where a mask decides (of a window, all). Every result
has one program that sums it in one order: no atomics, and a run repeats to the bit. The gradient of
a group's keys sums its query heads one after the other, so grouped heads are never expanded.

Scores are kept in units of ln 2, so that weights are powers of two. dScore = P (dP - delta) with
delta = rowsum(dOut * Out); the queries' pass writes delta, the keys' pass reads it.

Shapes: N packed tokens, H query heads, K key heads, E head size, C tiles. `stride` is from row to
row; columns have unit stride.
"""

import triton
import triton.language as tl

RUNTIME = ["num_tokens", "outer", "inner", "scale", "window"]


@triton.jit
def _load_rows(
    pointer,  # of a head's first row
    row,
    count,
    stride,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BOUNDED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows from `row` on, [BLOCK, BLOCK_E]; zeros from `count` on, if it bounds them."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_E)[None, :]
    pointers = pointer + row.to(tl.int64) * stride + rows * stride + columns
    if BOUNDED:
        x = tl.load(pointers, mask=(rows < count) & (columns < HEAD_SIZE), other=0.0)
    elif HEAD_SIZE < BLOCK_E:
        x = tl.load(pointers, mask=columns < HEAD_SIZE, other=0.0)
    else:
        x = tl.load(pointers)
    # Triton's interpreter keeps bfloat16 as integers, and computes with them as such.
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store_rows(
    x,
    pointer,
    row,
    count,
    stride,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_E)[None, :]
    pointers = pointer + row.to(tl.int64) * stride + rows * stride + columns
    x = x.to(pointer.dtype.element_ty)
    tl.store(pointers, x, mask=(rows < count) & (columns < HEAD_SIZE))


@triton.jit
def _scores(products, outer, inner, HAS_SOFTCAP: tl.constexpr):
    """Scores in units of ln 2, and their slope: d score / d product over `scale`."""
    slope = 1.0
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (e^(2x) + 1), which saturates cleanly where e^(2x) overflows.
        tanh = 1.0 - 2.0 / (tl.exp2(products * inner) + 1.0)
        slope = 1.0 - tanh * tanh
        products = tanh
    return products * outer, slope


@triton.jit
def _visible(query_position, key_position, limit, window, HAS_WINDOW: tl.constexpr):
    """Which keys the queries see; those at positions from `limit` on are hidden from all."""
    visible = (key_position <= query_position) & (key_position < limit)
    if HAS_WINDOW:
        visible &= query_position - key_position < window
    return visible


@triton.jit
def _query_tile(tiles_ptr, tile):
    """The columns of `QueryTile`."""
    tile_ptr = tiles_ptr + tile * 8
    row, num_queries = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    position, prefix_row = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    prefix_len, own_row = tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
    own_position, own_len = tl.load(tile_ptr + 6), tl.load(tile_ptr + 7)
    return row, num_queries, position, prefix_row, prefix_len, own_row, own_position, own_len


@triton.jit
def _seen_keys(
    position,  # of the first query
    prefix_len,
    own_position,
    own_len,
    window,
    HAS_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Tiles of keys for one of the two loops: first and number, of the prefix and of their own."""
    prefix_end, own_end = tl.cdiv(prefix_len, BLOCK), tl.cdiv(own_len, BLOCK)
    if HAS_WINDOW:  # tiles before it are not visited
        first = position - window + 1
        prefix_first = tl.minimum(tl.maximum(first, 0) // BLOCK, prefix_end)
        own_first = tl.minimum(tl.maximum(first - own_position, 0) // BLOCK, own_end)
    else:
        prefix_first = prefix_len // BLOCK
        own_first = tl.minimum((position - own_position) // BLOCK, own_end)
    if not MASKED:
        prefix_end, own_end = prefix_first, own_first
        prefix_first, own_first = 0, 0
    return prefix_first, prefix_end - prefix_first, own_first, own_end - own_first


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q_ptr,  # [H, N, E]
    k_ptr,  # [K, N, E]
    v_ptr,  # [K, N, E]
    out_ptr,  # [N, H, E], written
    lse_ptr,  # [H, N] fp32, written, in units of ln 2
    tiles_ptr,  # [C, 8] int32
    q_head_stride,
    q_stride,  # from row to row
    k_head_stride,
    k_stride,
    v_head_stride,
    v_stride,
    num_tokens,
    outer,
    inner,
    window,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention of one tile of queries of one head, with the running softmax of FlashAttention."""
    head = (tl.program_id(0) % NUM_HEADS).to(tl.int64)
    tile = tl.program_id(0) // NUM_HEADS
    row, num_queries, position, prefix_row, prefix_len, own_row, own_position, own_len = (
        _query_tile(tiles_ptr, tile)
    )
    q_ptr += head * q_head_stride
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride

    q = _load_rows(q_ptr, row, num_queries, q_stride, HEAD_SIZE, BLOCK_M, BLOCK_E, True, UPCAST)
    total = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_M], dtype=tl.float32)
    for MASKED in tl.static_range(HAS_WINDOW, 2):
        prefix_first, num_prefix, own_first, num_own = _seen_keys(
            position, prefix_len, own_position, own_len, window, HAS_WINDOW, BLOCK_N, MASKED
        )
        for i in range(num_prefix + num_own):
            in_prefix = i < num_prefix
            first = tl.where(in_prefix, prefix_first + i, own_first + i - num_prefix) * BLOCK_N
            key_row = tl.where(in_prefix, prefix_row, own_row) + first
            count = tl.where(in_prefix, prefix_len, own_len) - first
            k = _load_rows(
                k_ptr, key_row, count, k_stride, HEAD_SIZE, BLOCK_N, BLOCK_E, MASKED, UPCAST
            )
            z, _ = _scores(tl.dot(q, tl.trans(k)), outer, inner, HAS_SOFTCAP)
            if MASKED:
                key_position = tl.where(in_prefix, 0, own_position) + first
                visible = _visible(
                    position + tl.arange(0, BLOCK_M)[:, None],
                    key_position + tl.arange(0, BLOCK_N)[None, :],
                    key_position + count,
                    window,
                    HAS_WINDOW,
                )
                z = tl.where(visible, z, -float("inf"))
            new_top = tl.maximum(top, tl.max(z, axis=1))
            # A query's first tile of a window may hold nothing that it sees.
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            weights = tl.exp2(z - shift[:, None])
            rescale = tl.exp2(top - shift)
            mass = mass * rescale + tl.sum(weights, axis=1)
            v = _load_rows(
                v_ptr, key_row, count, v_stride, HEAD_SIZE, BLOCK_N, BLOCK_E, MASKED, UPCAST
            )
            total = tl.dot(weights.to(v.dtype), v, total * rescale[:, None])
            top = new_top
    mass = tl.where(mass == 0.0, 1.0, mass)  # rows behind the trees see nothing
    total = total / mass[:, None]
    out_stride = NUM_HEADS * HEAD_SIZE
    out_ptr += head * HEAD_SIZE
    _store_rows(total, out_ptr, row, num_queries, out_stride, HEAD_SIZE, BLOCK_M, BLOCK_E)
    offsets = tl.arange(0, BLOCK_M)
    lse_ptr += head * num_tokens + row
    tl.store(lse_ptr + offsets, top + tl.log2(mass), mask=offsets < num_queries)


@triton.jit(do_not_specialize=RUNTIME)
def query_gradient_kernel(
    q_ptr,  # [H, N, E]
    k_ptr,  # [K, N, E]
    v_ptr,  # [K, N, E]
    out_ptr,  # [N, H, E]
    grad_out_ptr,  # [N, H, E]
    lse_ptr,  # [H, N] fp32
    delta_ptr,  # [H, N] fp32, written
    grad_q_ptr,  # [N, H, E], written
    tiles_ptr,  # [C, 8] int32
    q_head_stride,
    q_stride,
    k_head_stride,
    k_stride,
    v_head_stride,
    v_stride,
    grad_out_head_stride,
    grad_out_stride,
    num_tokens,
    outer,
    inner,
    scale,
    window,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradient of one tile of queries of one head, and delta."""
    head = (tl.program_id(0) % NUM_HEADS).to(tl.int64)
    tile = tl.program_id(0) // NUM_HEADS
    row, num_queries, position, prefix_row, prefix_len, own_row, own_position, own_len = (
        _query_tile(tiles_ptr, tile)
    )
    q_ptr += head * q_head_stride
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    out_ptr += head * HEAD_SIZE
    grad_q_ptr += head * HEAD_SIZE
    grad_out_ptr += head * grad_out_head_stride
    out_stride = NUM_HEADS * HEAD_SIZE

    offsets = tl.arange(0, BLOCK_M)
    inside = offsets < num_queries
    out = _load_rows(
        out_ptr, row, num_queries, out_stride, HEAD_SIZE, BLOCK_M, BLOCK_E, True, UPCAST
    )
    grad_out = _load_rows(
        grad_out_ptr, row, num_queries, grad_out_stride, HEAD_SIZE, BLOCK_M, BLOCK_E, True, UPCAST
    )
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
    tl.store(delta_ptr + head * num_tokens + row + offsets, delta, mask=inside)
    lse = tl.load(lse_ptr + head * num_tokens + row + offsets, mask=inside, other=0.0)
    q = _load_rows(q_ptr, row, num_queries, q_stride, HEAD_SIZE, BLOCK_M, BLOCK_E, True, UPCAST)
    grad = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for MASKED in tl.static_range(HAS_WINDOW, 2):
        prefix_first, num_prefix, own_first, num_own = _seen_keys(
            position, prefix_len, own_position, own_len, window, HAS_WINDOW, BLOCK_N, MASKED
        )
        for i in range(num_prefix + num_own):
            in_prefix = i < num_prefix
            first = tl.where(in_prefix, prefix_first + i, own_first + i - num_prefix) * BLOCK_N
            key_row = tl.where(in_prefix, prefix_row, own_row) + first
            count = tl.where(in_prefix, prefix_len, own_len) - first
            k = _load_rows(
                k_ptr, key_row, count, k_stride, HEAD_SIZE, BLOCK_N, BLOCK_E, MASKED, UPCAST
            )
            v = _load_rows(
                v_ptr, key_row, count, v_stride, HEAD_SIZE, BLOCK_N, BLOCK_E, MASKED, UPCAST
            )
            z, slope = _scores(tl.dot(q, tl.trans(k)), outer, inner, HAS_SOFTCAP)
            weights = tl.exp2(z - lse[:, None])
            if MASKED:
                key_position = tl.where(in_prefix, 0, own_position) + first
                visible = _visible(
                    position + offsets[:, None],
                    key_position + tl.arange(0, BLOCK_N)[None, :],
                    key_position + count,
                    window,
                    HAS_WINDOW,
                )
                weights = tl.where(visible, weights, 0.0)
            grad_weights = tl.dot(grad_out, tl.trans(v))
            grad_scores = weights * (grad_weights - delta[:, None]) * slope
            grad = tl.dot(grad_scores.to(k.dtype), k, grad)
    grad *= scale
    _store_rows(grad, grad_q_ptr, row, num_queries, out_stride, HEAD_SIZE, BLOCK_M, BLOCK_E)


@triton.jit
def _seeing_queries(
    position,  # of the first key
    num_keys,
    num_own,
    num_other,
    trunk_len,
    window,
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Tiles of queries for one of the two loops: first and number of their own, and of others."""
    whole = position + num_keys <= trunk_len  # or some keys are chosen's
    if HAS_WINDOW:  # queries behind it are not visited
        end = position + BLOCK_N - 1 + window
        num_own = tl.minimum(num_own, end - position)
        num_other = tl.minimum(num_other, tl.maximum(end - trunk_len, 0))
        whole = False
    own_end = tl.cdiv(num_own, BLOCK_M)
    own_first = own_end if HAS_WINDOW else tl.minimum(tl.cdiv(BLOCK_N, BLOCK_M), own_end)
    others = tl.cdiv(num_other, BLOCK_M)
    if MASKED:
        return 0, own_first, tl.where(whole, 0, others)
    else:
        return own_first, own_end - own_first, tl.where(whole, others, 0)


@triton.jit(do_not_specialize=RUNTIME)
def key_gradient_kernel(
    q_ptr,  # [H, N, E]
    k_ptr,  # [K, N, E]
    v_ptr,  # [K, N, E]
    grad_out_ptr,  # [N, H, E]
    lse_ptr,  # [H, N] fp32
    delta_ptr,  # [H, N] fp32
    grad_k_ptr,  # [N, K, E], written
    grad_v_ptr,  # [N, K, E], written
    tiles_ptr,  # [C, 7] int32
    q_head_stride,
    q_stride,
    k_head_stride,
    k_stride,
    v_head_stride,
    v_stride,
    grad_out_head_stride,
    grad_out_stride,
    num_tokens,
    outer,
    inner,
    scale,
    window,
    NUM_KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of one tile of keys and values of one key head."""
    head = (tl.program_id(0) % NUM_KEY_HEADS).to(tl.int64)
    tile_ptr = tiles_ptr + tl.program_id(0) // NUM_KEY_HEADS * 7
    row, num_keys, position = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    num_own, other_row = tl.load(tile_ptr + 3), tl.load(tile_ptr + 4)
    num_other, trunk_len = tl.load(tile_ptr + 5), tl.load(tile_ptr + 6)
    k_ptr += head * k_head_stride
    v_ptr += head * v_head_stride
    k = _load_rows(k_ptr, row, num_keys, k_stride, HEAD_SIZE, BLOCK_N, BLOCK_E, True, UPCAST)
    v = _load_rows(v_ptr, row, num_keys, v_stride, HEAD_SIZE, BLOCK_N, BLOCK_E, True, UPCAST)
    grad_k = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    offsets = tl.arange(0, BLOCK_M)
    for MASKED in tl.static_range(HAS_WINDOW, 2):
        own_first, own_tiles, other_tiles = _seeing_queries(
            position,
            num_keys,
            num_own,
            num_other,
            trunk_len,
            window,
            HAS_WINDOW,
            BLOCK_M,
            BLOCK_N,
            MASKED,
        )
        # At least 1, for divisions that the compiler moves before the loop.
        num_tiles = tl.maximum(own_tiles + other_tiles, 1)
        for i in range(GROUP * (own_tiles + other_tiles)):
            query_head = head * GROUP + i // num_tiles
            tile = i % num_tiles
            is_own = tile < own_tiles
            first = tl.where(is_own, own_first + tile, tile - own_tiles) * BLOCK_M
            query_row = tl.where(is_own, row, other_row) + first
            count = tl.where(is_own, num_own, num_other) - first
            q_head = q_ptr + query_head * q_head_stride
            q = _load_rows(
                q_head, query_row, count, q_stride, HEAD_SIZE, BLOCK_M, BLOCK_E, True, UPCAST
            )
            grad_out = _load_rows(
                grad_out_ptr + query_head * grad_out_head_stride,
                query_row,
                count,
                grad_out_stride,
                HEAD_SIZE,
                BLOCK_M,
                BLOCK_E,
                True,
                UPCAST,
            )
            statistics = query_head * num_tokens + query_row + offsets
            # Rows that are not there get weights of 2^-inf.
            lse = tl.load(lse_ptr + statistics, mask=offsets < count, other=float("inf"))
            delta = tl.load(delta_ptr + statistics, mask=offsets < count, other=0.0)
            z, slope = _scores(tl.dot(k, tl.trans(q)), outer, inner, HAS_SOFTCAP)
            weights = tl.exp2(z - lse[None, :])
            if MASKED:
                query_position = tl.where(is_own, position, trunk_len) + first
                visible = _visible(
                    query_position + offsets[None, :],
                    position + tl.arange(0, BLOCK_N)[:, None],
                    tl.where(is_own, query_position + BLOCK_M, trunk_len),
                    window,
                    HAS_WINDOW,
                )
                weights = tl.where(visible, weights, 0.0)
            grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v)
            grad_weights = tl.dot(v, tl.trans(grad_out))
            grad_scores = weights * (grad_weights - delta[None, :]) * slope
            grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k)
    grad_k *= scale
    out_stride = NUM_KEY_HEADS * HEAD_SIZE
    grad_k_ptr += head * HEAD_SIZE
    grad_v_ptr += head * HEAD_SIZE
    _store_rows(grad_k, grad_k_ptr, row, num_keys, out_stride, HEAD_SIZE, BLOCK_N, BLOCK_E)
    _store_rows(grad_v, grad_v_ptr, row, num_keys, out_stride, HEAD_SIZE, BLOCK_N, BLOCK_E)
