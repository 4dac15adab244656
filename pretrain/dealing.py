"""Work of known sizes, dealt out to the processes of a launch."""

from collections.abc import Sequence


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Which pieces of work each process does, ascending: the largest is dealt first, to whoever has
    least. By the sizes alone, so every process finds the same.

    Args:
        sizes: of the pieces, in tokens or so.
        hands: processes; where there are fewer pieces, some have none.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    loads = [0] * hands
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        hand = loads.index(min(loads))
        dealt[hand].append(piece)
        loads[hand] += sizes[piece]
    return [sorted(hand) for hand in dealt]
