"""What each process runs in test_restart.py: rank 1 dies in the first attempt."""

import os
import time

import torch

from learnables.launch import join, leave


def main():
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt and rank == 0:
        time.sleep(1)  # rank 1 looks for it before it is there, and finds what its predecessor left
    device = join()
    if attempt == 0 and rank == 1:
        os._exit(1)
    number = torch.ones(1, device=device)
    torch.distributed.all_reduce(number)
    if rank == 0:
        print(f"{number.item():.0f} ranks in attempt {attempt}")
    leave()


if __name__ == "__main__":
    main()
