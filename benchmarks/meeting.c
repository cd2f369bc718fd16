// Where ranks that share a GPU wait for each other: a host function in a CUDA stream (cudaLaunchHostFunc), which a CUDA
// graph can record. It may not call CUDA, and needs no Python.
#include <sched.h>
#include <stdatomic.h>

struct meeting {
    _Atomic long *arrived;  // in memory that all ranks share: one counter a rank, 64 bytes apart
    long rank, world;
};

void meet(void *data) {
    struct meeting *meeting = data;
    long mine = atomic_fetch_add(&meeting->arrived[meeting->rank * 8], 1) + 1;
    for (long rank = 0; rank < meeting->world; rank++)
        while (atomic_load(&meeting->arrived[rank * 8]) < mine)
            sched_yield();
}
