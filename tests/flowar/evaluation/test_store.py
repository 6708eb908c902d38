import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flowar.evaluation.store import read_ahead
from tests.processes import PATIENCE_S


def test_the_next_batch_is_read_during_work_on_this_one():
    begun = {batch: threading.Event() for batch in (range(3), range(3, 5), range(5, 6))}

    def read(batch):
        begun[batch].set()
        return np.array(batch, dtype=np.uint8)

    batches = list(begun)
    with ThreadPoolExecutor(1) as ahead:
        found = []
        for pixels, following in zip(read_ahead(read, batches, ahead), [*batches[1:], None], strict=True):
            assert following is None or begun[following].wait(PATIENCE_S)  # before this one is given back
            found.append(pixels.tolist())
    assert found == [[0, 1, 2], [3, 4], [5]]
