// Where ranks that share a GPU wait for each other: a host function in a CUDA stream (cudaLaunchHostFunc), which a CUDA
// graph can record. It may not call CUDA, and needs no Python.
#include <stdatomic.h>
#include <time.h>

struct meeting {
    _Atomic long *arrived;  // in memory that all ranks share: one counter a rank, 64 bytes apart
    long rank, world;
};

void meet(void *data) {
    struct meeting *meeting = data;
    long mine = atomic_fetch_add(&meeting->arrived[meeting->rank * 8], 1) + 1;
    for (long rank = 0; rank < meeting->world; rank++)
        while (atomic_load(&meeting->arrived[rank * 8]) < mine)
            nanosleep(&(struct timespec){.tv_nsec = 20000}, 0);  // leaves the processor to the others
}
