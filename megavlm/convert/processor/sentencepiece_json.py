"""A SentencePiece model as the ``tokenizer.json`` that ``transformers`` reads.

Sources: the model file's own description (sentencepiece_model.proto of google/sentencepiece 0.2) and the tokenizers
library, whose Unigram and BPE are those of SentencePiece. Known to differ: text that spells a byte piece (``<0x41>``)
is one token there, and decoding bytes that make no character spoils all bytes beside them.
"""

from collections.abc import Collection
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers

_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_SPACE = "\u2581"


class SentencePieceFile:
    """What a model file says, as far as another tokenizer must know it."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ValueError: it asks for something that ``tokenizer.json`` cannot say.
        """
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(path.read_bytes())
        self._model = model
        self.pieces = [piece.piece for piece in model.pieces]
        """The spelling of each token."""
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        problems = []
        if trainer.model_type not in (_UNIGRAM, _BPE):
            name = sentencepiece_model_pb2.TrainerSpec.ModelType.Name(trainer.model_type)
            problems.append(f"model_type={name} (only UNIGRAM and BPE)")
        if trainer.treat_whitespace_as_suffix:
            problems.append("treat_whitespace_as_suffix=true (only false)")
        if not normalizer.escape_whitespaces:
            problems.append("escape_whitespaces=false (only true)")
        if len(set(self.pieces)) != len(self.pieces):
            problems.append("two pieces of one spelling")
        if problems:
            raise ValueError(
                f"tokenizer.path={path}: cannot be written as tokenizer.json: {'; '.join(problems)}. Use the file with "
                "the sentencepiece package."
            )

    @property
    def first_text(self) -> list[str]:
        """What is done to the beginning of a text; names of ``text_megavlm.py``."""
        normalizer = self._model.normalizer_spec
        given = {"squeeze": normalizer.remove_extra_whitespaces, "prefix": normalizer.add_dummy_prefix}
        return [name for name, is_asked in given.items() if is_asked]

    @property
    def unreadable_ids(self) -> list[int]:
        """Tokens that no text encodes to: control symbols and unused pieces."""
        return [index for index, piece in enumerate(self._model.pieces) if piece.type in (_CONTROL, _UNUSED)]

    def build(self, reserved: Collection[str], image_token: str) -> tokenizers.Tokenizer:
        """Make the tokenizer.

        Args:
            reserved: pieces that are special tokens.
            image_token: added behind the vocabulary where it is no piece.
        """
        normalizer = self._model.normalizer_spec
        tokenizer = tokenizers.Tokenizer(self._unigram() if self._is_unigram else self._bpe())
        charsmap = normalizer.precompiled_charsmap
        if charsmap:
            tokenizer.normalizer = normalizers.Precompiled(charsmap)
        scheme = "first" if normalizer.add_dummy_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        added = [
            tokenizers.AddedToken(piece.piece, special=piece.piece in reserved, normalized=False)
            for piece in self._model.pieces
            if piece.piece in reserved or piece.type in (_CONTROL, _USER_DEFINED)
        ]
        tokenizer.add_tokens(added)
        tokenizer.add_special_tokens([tokenizers.AddedToken(image_token, special=True, normalized=False)])
        return tokenizer

    @property
    def _is_unigram(self) -> bool:
        return self._model.trainer_spec.model_type == _UNIGRAM

    def _unigram(self) -> models.Unigram:
        trainer = self._model.trainer_spec
        vocabulary = [(piece.piece, piece.score) for piece in self._model.pieces]
        return models.Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)

    def _bpe(self) -> models.BPE:
        """Of two neighbours SentencePiece joins those first whose union has the best score."""
        trainer = self._model.trainer_spec
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        joined = [piece for piece in self._model.pieces if piece.type not in (_CONTROL, _USER_DEFINED, _UNUSED)]
        merges: list[tuple[float, int, int, tuple[str, str]]] = []
        for piece in joined:
            for cut in range(1, len(piece.piece)):
                pair = piece.piece[:cut], piece.piece[cut:]
                if pair[0] in ids and pair[1] in ids:
                    merges.append((-piece.score, ids[pair[0]], ids[pair[1]], pair))
        return models.BPE(
            ids,
            [pair for *_, pair in sorted(merges)],
            unk_token=self.pieces[trainer.unk_id],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
