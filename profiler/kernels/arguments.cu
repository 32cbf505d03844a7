// Takes NUM_ARGS arguments of 8 bytes and does next to nothing with them: what passing arguments costs the host.
//
// out: [1], the first argument; one thread writes the sum of the others there, so that none goes unused.

#define PARAMS_3(name) , u64 name##0, u64 name##1, u64 name##2
#define PARAMS_4(name) PARAMS_3(name), u64 name##3
#define SUM_3(name) +name##0 + name##1 + name##2
#define SUM_4(name) SUM_3(name) + name##3

#if NUM_ARGS == 1
#define PARAMS
#define SUM
#elif NUM_ARGS == 4
#define PARAMS PARAMS_3(a)
#define SUM SUM_3(a)
#elif NUM_ARGS == 8
#define PARAMS PARAMS_3(a) PARAMS_4(b)
#define SUM SUM_3(a) SUM_4(b)
#elif NUM_ARGS == 16
#define PARAMS PARAMS_3(a) PARAMS_4(b) PARAMS_4(c) PARAMS_4(d)
#define SUM SUM_3(a) SUM_4(b) SUM_4(c) SUM_4(d)
#else
#error "expected NUM_ARGS of 1, 4, 8 or 16"
#endif

extern "C" __global__ void __launch_bounds__(32) arguments(u64* out PARAMS) {
    if (threadIdx.x == 0) *out = 0 SUM;
}
