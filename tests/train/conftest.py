from tests.train.tiny_run import data, no_picture

__all__ = ["data", "no_picture"]
