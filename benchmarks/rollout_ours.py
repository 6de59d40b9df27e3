"""The library's engine, one of benchmarks/rollout.py, which runs this."""

import turns


def engine(vocabulary: int, lengths: list[int]):
    raise NotImplementedError


if __name__ == "__main__":
    turns.serve(engine)
