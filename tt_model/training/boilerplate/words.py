"""The words that names are made of, the forms that programs give them, and which names training never sees.

Common English words of at most eight letters that are no keyword, builtin or module of Python and no keyword of SQL.
Some words of a name are made up, of parts of others or of syllables. Few of those are a token of a tokenizer, so that a
model learns to copy words that it does not know, of whatever tokens.
"""

from __future__ import annotations

import builtins
import hashlib
import keyword
import random
from collections.abc import Sequence

_NOUNS = """
account actor address agent airport album alert amount answer archive area artist asset author badge balance banner
basket battery block boat border bottle branch bridge broker bucket budget bundle button camera candle canvas captain
carrier castle center chain channel chapter circle city client cloud coach color comment company contact corner cost
country county course cover crew curve customer dealer degree deposit depth desk device discount distance district
doctor document door draft driver edition editor element employee engine entry error event exam expense factory farmer
feature field figure flight floor flower folder forest frame friend fruit garden gate glass goal grade graph guest guide
handle harbor height holder hotel house image income invoice island item journey judge kitchen ladder lamp layer leader
lesson letter level library lock machine manager margin market measure medal member memory menu message meter mirror
model moment monitor month mountain museum network note notice number office officer owner package page painter palace
panel parcel parent partner party patient pattern payment person phone picture pilot pixel place planet plant player
pocket point policy pool port post power price printer prize problem product project prompt quarter question rank rate
ratio receipt recipe record region rental report reward river road robot roof room route salary sample scale schedule
school score screen season seat section sender sensor server service session shape share ship shop size slot source
speaker speed sponsor stage stamp star station store story street student subject summary supplier surface survey system
target task teacher team theater ticket title tool topic total tower track trade train tree trip truck tunnel unit user
vehicle vendor venue village visitor voucher wallet weight wheel width winner wire witness worker writer yard year zone
"""
_ADJECTIVES = """
active annual basic blue brief bright broad broken busy cheap clean clear cold cool daily dark deep double dry early
easy empty extra fair fast final fine fixed flat formal free fresh gentle golden grand gray great green happy hard heavy
hidden high hot huge large late light local loud lower main major mature minor mixed modern monthly narrow native new
normal old paid pale plain prime private proper public pure quick quiet rapid rare ready recent red remote rough royal
safe second secure sharp short silent silver simple single slow small smooth soft solid stable steady strict strong
sunny sweet tall thick thin tidy tiny urgent valid verbose warm weak weekly wet white whole wide wild wooden
yellow young
"""
_VERBS = """
accept adjust approve arrange borrow build cancel capture carry change charge climb close collect combine confirm
connect convert correct deliver detect divide draw enter examine expand explore fetch fill finish fold follow gather
grow hide hold install invite launch learn leave lift merge move notify pack paint pause prepare press publish pull push
receive recover reduce refuse reject remove repair resize restore resume review rotate save scan search send shrink sign
sort split stop submit suspend switch teach trim turn unlock upgrade upload verify wait wake wash weigh wrap
"""
NOUNS, ADJECTIVES, VERBS = (tuple(words.split()) for words in (_NOUNS, _ADJECTIVES, _VERBS))
MADE_UP = 0.25  # of the words, where nothing else is said
LONGEST = 15  # letters of a name: so every line of a program fits into 88 columns


def digest(text: str) -> int:
    """A number of 32 bits: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def share(text: str) -> float:
    """A text's own number from 0 to 1."""
    return digest(text) / 2**32


UNSEEN = frozenset(word for word in {*NOUNS, *ADJECTIVES, *VERBS} if share(f"new {word}") < 0.06)


# What a word that is made up must not be: one of ours, a keyword of SQL, a name that the programs themselves have.
_RESERVED = """
args argv auto collate commit create data detach dict drop enum file fire insert last like limit made main make models
offset other parse parser path primary query rename row rows select self state table temp text union value where
"""
_ONSETS, _VOWELS, _CODAS = (  # of syllables; common ones stand more than once
    tuple(parts.split(" "))
    for parts in (
        "b br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sc sh sk sl sm sn sp st str t th tr v w y z",
        "a a e e i i o o u ai ea ee oa oo ou",
        "    b ck d g l ll m n nd ng nk nt p r rd rk rm s ss st t x",
    )
)
_TAKEN = frozenset({*NOUNS, *ADJECTIVES, *VERBS, *_RESERVED.split()})


def is_held(name: str) -> bool:
    """Whether a name of two words is one that training never has."""
    return "_" in name and share(f"name {name}") < 0.1


def has_unseen(name: str) -> bool:
    """Whether training never has a word of this name."""
    return not UNSEEN.isdisjoint(name.split("_"))


def snake(name: str) -> str:
    """ "DarkRoom" as "dark_room"."""
    return "".join("_" * bool(i and c.isupper()) + c.lower() for i, c in enumerate(name))


def camel(name: str) -> str:
    """ "dark_room" as "DarkRoom"."""
    return "".join(word.capitalize() for word in name.split("_"))


def plural(name: str) -> str:
    """Of its last word: "y" after a consonant gives "ies"; s, x, z, ch and sh take "es"; all others take "s"."""
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s")


def made_up(rng: random.Random, words: Sequence[str]) -> str:
    """A word that is none of ours and nothing that Python or SQL knows: the beginning of one of these and the end of
    another, cut anywhere ("brocket"), or two or three syllables ("plamon"). Words that training never has may lend
    their parts: what is unseen is the word."""
    while True:
        if rng.random() < 0.5:
            one, two = rng.choice(words), rng.choice(words)
            word = one[: rng.randrange(1, len(one))] + two[rng.randrange(1, len(two)) :]
        else:
            word = "".join(map(rng.choice, (_ONSETS, _VOWELS, _CODAS) * rng.randint(2, 3)))
        if 4 <= len(word) <= 8 and word not in _TAKEN and not keyword.iskeyword(word) and not hasattr(builtins, word):
            return word


class Names:
    """Names for one specification, all different, of the words and pairs that a split may have.

    A split of held-out names takes one for every other name. made_up: the share of words that are.
    """

    def __init__(self, rng: random.Random, split: str, made_up: float = MADE_UP) -> None:
        self.rng, self.split, self.made_up, self.taken = rng, split, made_up, set[str]()

    def noun(self) -> str:
        """A thing: "invoice", "paid_invoice", "invoice_number"."""
        return self._draw((NOUNS,), (NOUNS,), (ADJECTIVES, NOUNS), (NOUNS, NOUNS))

    def quality(self) -> str:
        """A state or a choice: "paid", "deep_blue"."""
        return self._draw((ADJECTIVES,), (ADJECTIVES,), (NOUNS,), (ADJECTIVES, NOUNS))

    def action(self) -> str:
        """A verb, perhaps with its object: "resize", "resize_image"."""
        return self._draw((VERBS,), (VERBS, NOUNS))

    def verb(self) -> str:
        return self._draw((VERBS,))

    def _word(self, words: tuple[str, ...]) -> str:
        return made_up(self.rng, words) if self.rng.random() < self.made_up else self.rng.choice(words)

    def _draw(self, *forms: tuple[tuple[str, ...], ...]) -> str:
        insists = self.rng.random() < 0.5
        for attempt in range(1000):
            name = "_".join(map(self._word, self.rng.choice(forms)))
            words = name.split("_")
            if len(name) > LONGEST or name in self.taken or len(set(words)) < len(words):
                continue
            side = "words" if has_unseen(name) else "pairs" if is_held(name) else ""
            if side and side != self.split:
                continue
            if insists and not side and self.split in ("words", "pairs") and attempt < 500:
                continue
            self.taken.add(name)
            return name
        raise RuntimeError("no name is left")
