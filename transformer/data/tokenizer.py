"""From text to token numbers and back."""

from collections.abc import Iterable

from transformer.errors import UserError, nearest

PAD, BOS, EOS = 0, 1, 2
SPECIALS = ("<pad>", "<bos>", "<eos>")


class CharTokenizer:
    """One token a character, after padding, beginning and end of sequence.

    Args:
      alphabet: the characters it knows, in the order of their numbers.
    """

    def __init__(self, alphabet: str):
        self.pieces = (*SPECIALS, *alphabet)
        self.ids = {piece: number for number, piece in enumerate(self.pieces)}

    @property
    def vocab_size(self) -> int:
        """Rounded up to a multiple of 8, so that a mesh can split it; the rest is never used."""
        return -(-len(self.pieces) // 8) * 8

    def encode(self, text: str) -> list[int]:
        """The numbers of `text`'s characters and EOS.

        Raises:
          UserError: a character is not in the alphabet.
        """
        try:
            return [*(self.ids[character] for character in text), EOS]
        except KeyError as unknown:
            (character,) = unknown.args
            raise UserError(
                f"{character!r} in {text!r} is not one of the tokenizer's characters "
                f"{''.join(self.pieces[len(SPECIALS) :])}{nearest(character.lower(), self.ids)}"
            ) from None

    def symbol(self, token: int) -> str:
        """One character for a plot's axis: the token's own, or ⊢ for BOS and ⊣ for EOS."""
        return {BOS: "⊢", EOS: "⊣"}.get(token, self.pieces[token])

    def decode(self, tokens: Iterable[int]) -> str:
        """The text before the first EOS; tokens that are no character show as their name or `?`."""
        text = []
        for token in tokens:
            if token == EOS:
                break
            text.append(self.pieces[token] if token < len(self.pieces) else "?")
        return "".join(text)
