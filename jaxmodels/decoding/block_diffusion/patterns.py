"""The attention patterns of diffusion language models, and the states that predict masked tokens under them.

| pattern | input | allowed(q, k) |
|---|---|---|
| `autoregressive` | clean, L | k <= q |
| `bidirectional` | noisy, L | all |
| `block_causal` | noisy, L | block(k) <= block(q) |
| `block_diffusion` | [noisy ; clean], 2L | the doubled mask, `pallas_kernels.masks.BlockDiffusion` |
| `prefix_bidirectional` | noisy, L | k <= P or q >= P |

Letters: B rows, L positions of a row, D model dim. Block boundaries lie at multiples of `block_size` of the
row; `segment_ids` additionally keep every document of a packed row to itself.

Source: Efficient-DLM (arXiv 2512.14067), sections on attention patterns and token shift.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.decoding.block_diffusion.corruption import check_block_size
from jaxmodels.decoding.cross_entropy import token_nll
from pallas_kernels.masks import BlockCausal, BlockDiffusion, Causal, Full, Mask, PrefixBidirectional

PATTERNS = ("autoregressive", "bidirectional", "block_causal", "block_diffusion", "prefix_bidirectional")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which pattern, with its parameters; hashable."""

    kind: str = "block_diffusion"
    """one of PATTERNS"""
    block_size: int | None = None
    """block length of `block_causal` and `block_diffusion`; must be None elsewhere"""
    clean: Literal["block", "token"] = "block"
    """clean half of `block_diffusion`: "block", or "token" (causal, for the joint autoregressive loss)"""
    prefix_len: int | None = None
    """P of `prefix_bidirectional`; must be None elsewhere"""

    def __post_init__(self):
        if self.kind not in PATTERNS:
            raise ValueError(f"pattern must be one of {list(PATTERNS)}; got {self.kind!r}")
        in_blocks = self.kind in ("block_causal", "block_diffusion")
        if in_blocks and self.block_size is None:
            raise ValueError(f"pattern {self.kind!r} needs block_size; got None")
        if not in_blocks and self.block_size is not None:
            raise ValueError(f"pattern {self.kind!r} has no blocks: block_size must be None; got {self.block_size}")
        if self.block_size is not None:
            check_block_size(self.block_size)
        if self.clean not in ("block", "token"):
            raise ValueError(f"clean must be 'block' or 'token'; got {self.clean!r}")
        if self.clean == "token" and self.kind != "block_diffusion":
            raise ValueError(f"clean='token' needs pattern 'block_diffusion'; got {self.kind!r}")
        if (self.prefix_len is not None) != (self.kind == "prefix_bidirectional"):
            raise ValueError(
                f"prefix_len belongs to pattern 'prefix_bidirectional'; got prefix_len={self.prefix_len} "
                f"with {self.kind!r}"
            )

    @property
    def doubled(self) -> bool:
        return self.kind == "block_diffusion"

    def mask(self, length: int) -> Mask:
        """The attention mask for rows of `length` tokens (of 2 * `length` model inputs when doubled)."""
        if self.kind == "autoregressive":
            return Causal()
        if self.kind == "bidirectional":
            return Full()
        if self.prefix_len is not None:
            return PrefixBidirectional(self.prefix_len)
        assert self.block_size is not None  # checked above
        if self.kind == "block_causal":
            return BlockCausal(self.block_size)
        return BlockDiffusion(length, self.block_size, self.clean)


class Predictions(NamedTuple):
    """States that the head turns into distributions over the tokens at their own index.

    states: [B, L, D] after the final norm; index i predicts token i.
    valid: False where no state predicts token i (first token of a document under a shift).
    clean: states of the clean half at their own index, unshifted; None unless the pattern is doubled.
    """

    states: Float[Array, "B L D"]
    valid: Bool[Array, "B L"]
    clean: Float[Array, "B L D"] | None


def segment_positions(segment_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Positions that restart at 0 with every document of a packed row."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    first = (segment_ids != jnp.roll(segment_ids, 1, axis=1)) | (index == 0)
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def predict(
    lm: Any,
    params: Any,
    tokens: Int[Array, "B L"],
    masked: Bool[Array, "B L"],
    pattern: Pattern,
    *,
    mask_id: int,
    positions: Int[Array, "B L"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    token_shift: bool = False,
    shift_context: str = "noisy",
    **hidden_options: Any,
) -> Predictions:
    """Runs the model on `tokens` with those of `masked` replaced by `mask_id`, under `pattern`.

    Both halves of a doubled input are rotated at positions 0..L-1 (or `positions`; with `segment_ids` alone
    they restart per document).

    With `token_shift`, index i is predicted by the state of index i - 1 (models that keep the
    autoregressive alignment). `shift_context` says which state predicts the first token of a block:
    "noisy", the noisy half's state before it, as in the released training code; "clean", the clean half's,
    as in decoding, where that state comes from the committed block (doubled patterns only).
    The pattern `autoregressive` reads clean tokens, ignores `masked`, and is always shifted.

    Args:
        lm: a `CausalLM`.
        params: its weights.
        tokens: clean tokens.
        masked: positions whose tokens are hidden.
        pattern: attention pattern.
        mask_id: id of the mask token.
        positions: rotary positions.
        segment_ids: documents of packed rows; tokens see only their own.
        token_shift: see above.
        shift_context: see above.
        hidden_options: passed on to `lm.hidden` (remat, unroll).
    """
    if shift_context not in ("noisy", "clean"):
        raise ValueError(f"shift_context must be 'noisy' or 'clean'; got {shift_context!r}")
    if shift_context == "clean" and not (token_shift and pattern.doubled):
        raise ValueError("shift_context='clean' needs token_shift=True and a block_diffusion pattern")
    length = tokens.shape[1]
    if positions is None and segment_ids is not None:
        positions = segment_positions(segment_ids)
    autoregressive = pattern.kind == "autoregressive"
    noisy = tokens if autoregressive else jnp.where(masked, mask_id, tokens)
    inputs = noisy
    if pattern.doubled:
        inputs = jnp.concatenate([noisy, tokens], axis=1)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        positions = jnp.concatenate([positions, positions], axis=1)
        if segment_ids is not None:
            segment_ids = jnp.concatenate([segment_ids, segment_ids], axis=1)
    states = lm.hidden(
        params,
        inputs,
        positions=positions,
        mask=pattern.mask(length),
        segment_ids=segment_ids,
        **hidden_options,
    ).states
    clean = states[:, length:] if pattern.doubled else None
    states = states[:, :length]
    valid = jnp.ones(tokens.shape, bool)
    if token_shift or autoregressive:
        shifted = _shift(states)
        if clean is not None and pattern.block_size is not None and shift_context == "clean":
            first = (jnp.arange(length) % pattern.block_size == 0)[None, :, None]
            shifted = jnp.where(first, _shift(clean), shifted)
        states = shifted
        valid = valid.at[:, 0].set(False)
        if segment_ids is not None:
            same = segment_ids[:, 1:length] == segment_ids[:, : length - 1]
            valid = valid.at[:, 1:].set(same)
    return Predictions(states, valid, clean)


def _shift(states: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """State i - 1 at index i; zeros at index 0."""
    return jnp.pad(states, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def gathered_nll(
    lm: Any,
    params: Any,
    states: Float[Array, "B L D"],
    targets: Int[Array, "B L"],
    where: Bool[Array, "B L"],
    *,
    fraction: float = 0.625,
    groups: int = 1,
    chunk_size: int | None = None,
    suppress: tuple[int, ...] = (),
    z_loss: float = 0.0,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """(nll, z term) of `targets` at the positions of `where`, 0 elsewhere; the others skip the head.

    On average half of all positions are masked, and the projection on the vocabulary dominates small and
    mid-sized models, so masked positions are gathered before it. Shapes must be static: the gather has room
    for `fraction` of all positions; a batch with more of them takes a second compiled path over all
    positions, so nothing is ever dropped.

    Args:
        lm: a `CausalLM`.
        params: its weights.
        states: after the final norm.
        targets: token ids.
        where: positions wanted.
        groups: the rows are gathered in this many equal parts, each by itself. On a mesh pass the number
            of batch shards, so that no state leaves its device.
        fraction: room of the gather, in (0, 1]; 1 compiles the plain path only.
        chunk_size: see `token_nll`.
        suppress: see `token_nll`.
        z_loss: see `token_nll`.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must lie in (0, 1]; got {fraction}")
    batch, length, dim = states.shape
    if groups < 1 or batch % groups:
        raise ValueError(f"groups must divide the batch of {batch} rows; got {groups}")

    def nll_of(rows: Array, ids: Array) -> tuple[Array, Array]:
        flat = rows.reshape(-1, dim)
        nll, z = token_nll(
            lambda s: lm.head(params, s), flat, ids.reshape(-1), chunk_size=chunk_size, z_loss=z_loss,
            suppress=suppress,
        )  # fmt: skip
        return nll.reshape(ids.shape), z.reshape(ids.shape)

    size = batch * length // groups
    room = min(size, -(-int(size * fraction) // 8) * 8)
    # A target that may not be predicted has an infinite loss, whose product with weight 0 is NaN.
    targets = jnp.where(where, targets, _some_allowed_id(suppress))
    grouped_where = where.reshape(groups, size)

    def over_all():
        return nll_of(states, targets)

    def over_gathered():
        index = jax.vmap(lambda w: jnp.nonzero(w, size=room, fill_value=size)[0])(grouped_where)
        # Unused room points beyond the end, each slot elsewhere: the gradient then scatters to distinct rows, which
        # a GPU does without atomic additions.
        index = jnp.where(index < size, index, size + jnp.arange(room))

        def pick(values: Array, fill: int) -> Array:
            get = jax.vmap(lambda v, i: v.at[i].get(mode="fill", fill_value=fill, unique_indices=True))
            return get(values, index)

        rows = pick(states.reshape(groups, size, dim), 0)
        ids = pick(targets.reshape(groups, size), _some_allowed_id(suppress))

        def put(values: Array) -> Array:
            spread = jax.vmap(lambda v, i: jnp.zeros((size,), v.dtype).at[i].set(v, mode="drop", unique_indices=True))
            return spread(values, index).reshape(batch, length)

        nll, z = nll_of(rows, ids)
        return put(nll), put(z)

    if room == size:
        nll, z = over_all()
    else:
        fits = jnp.max(jnp.sum(grouped_where, axis=1)) <= room
        nll, z = jax.lax.cond(fits, over_gathered, over_all)
    return jnp.where(where, nll, 0.0), jnp.where(where, z, 0.0)


def _some_allowed_id(suppress: tuple[int, ...]) -> int:
    return next(i for i in range(len(suppress) + 1) if i not in suppress)
