"""Damaged YAML and JSON, made from good files: used by fuzz_words.py."""

import copy
import json

import yaml

TEXTS = [
    "", " ", "-", "--", "-1", "0", "-0", "1.5", "1e3", "1e400", "-1e400", "nan", "inf", "None", "true", "[]",
    "{}", "0x10", "1_0", "9" * 19, "9" * 30, "9" * 5000, "٣", "½", "ü", "\u202e", "\udcff", "a\nb\nc\nd\ne",
    "a\0b", "\x1b[31m", "x" * 5000, "%s", "{0}", "1,2", "1,,2", ",", "1-", "-5", "8-4", "1-999999999999",
    "1,2,3", "breadth-first", "zero3,zero3", "--help-me", "${HOME}", "$(id)",
]  # fmt: skip
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    10**30,
    -(10**30),
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
    [[]],
    {"a": 1},
]
VALUES += ["\x1b[31m", "ü\u202e", [1, "a", None], {"step": -1}, "0F0", 10**400]
YAMLS = [
    b"", b"\0\1\2\xff\xfe", b"\t", b"a:\n\t- b", b"[" * 3000, b"{" * 3000, b"a: &a [*a]", b"MODEL_ARGS: &a {--x: *a}",
    b"&a {*a : 1}", b"? [a]\n: 1\n",
    b"MODEL_ARGS: !!python/object:os.system {}", b"MODEL_ARGS: 2020-01-01", b"2020-99-99",
    b"MODEL_ARGS: {--num-layers: 2020-99-99}",
    b"MODEL_ARGS: {--a: 1, --a: 2}", b"--- 1\n--- 2\n", b"a: b: c", b"%YAML 9.9\n---\na",
    b"MODEL_ARGS: {--num-layers: 0x" + b"f" * 5000 + b"}",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n,
                                                                   b",".join([b"*%c" % (97 + n)] * 9)) for n in
                                                                   range(20)),
    b"MODEL_ARGS: {<<: *x}", b"MODEL_ARGS:\n  <<: [1]\n", b"1: " * 500, b"'", b"!!binary x", b"MODEL_ARGS: !!set {a}",
    b"x" * 200_000,
    b"MODEL_ARGS: {--num-layers: " + b"9" * 5000 + b"}", b"MODEL_ARGS: {--lr: 1:60:60}", b"MODEL_ARGS: {--x: !!int x}",
    b"MODEL_ARGS: {--x: !!float x}",
]  # fmt: skip
JSONS = [
    b"", b"\xff\xfe", b"[" * 100_000, b"{" * 3000, b"null", b"[]", b"1e999", b"9" * 6000, b'"\\ud800"',
    b'{"a": NaN}', b"\xef\xbb\xbf{}", b"{}",
]  # fmt: skip


def chance(rng, probability):
    """Return True with this probability. 0, to which hypothesis shrinks what it draws, is False."""
    return rng.randrange(1000) >= 1000 * (1 - probability)


def damaged(rng, data):
    """Bytes with a few faults."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[min(to, at + 20) :]
        elif kind == 2:
            data = (
                data[:at]
                + rng.choice(
                    (b"\0", b"\xff", b"\t", b"\n", b"NaN", b"-", b"{", b"}", b"&a ", b"*a", b": ", b"1e999", b'"')
                )
                + data[at:]
            )
        elif kind == 3:
            data = data[:at] + rng.randbytes(rng.randrange(9)) + data[at + rng.randrange(9) :]
        elif kind == 4:
            lines = data.split(b"\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            data = b"\n".join(lines)
        else:
            data = data[:at] + data[to:] + data[at:to]
    return data


def altered(rng, value):
    """A value of YAML or JSON with one part replaced, left out or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 3))):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                return copy.deepcopy(rng.choice(VALUES))
            key = rng.choice(keys)
            if not isinstance(place[key], dict | list) or not place[key] or chance(rng, 0.3):
                break
            place = place[key]
        if chance(rng, 0.3):
            del place[key]
        elif isinstance(place, dict) and chance(rng, 0.2):
            place[rng.choice(TEXTS).replace("\udcff", "")] = place[key]
        else:
            place[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def config(rng, source):
    """A YAML file's bytes: most often a valid one with a fault."""
    kind = rng.randrange(6)
    data = source.read_bytes()
    if kind == 0:
        return data
    if kind == 1:
        return rng.choice(YAMLS)
    if kind < 4:
        return damaged(rng, data)
    return yaml.safe_dump(altered(rng, yaml.safe_load(data)), allow_unicode=True).encode("utf-8", "replace")


def json_file(rng, value):
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(JSONS)
    if kind == 1:
        return damaged(rng, json.dumps(value).encode())
    return json.dumps(altered(rng, value)).encode("utf-8", "replace")
