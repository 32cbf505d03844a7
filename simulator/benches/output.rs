//! What a simulation's output costs: collecting and reading distributions, formatting and writing rows.

use std::{
    hint::black_box,
    io::{self, Write},
};

use divan::{Bencher, counter::ItemsCount};
use plumbline_schema::{
    Nanos, PrefillChunk, RequestMetrics, RequestStatus, StepBatch, StepMetrics, TokenMetrics,
};
use plumbline_simulator::metrics::{DEFAULT_MAX_BYTES, ExactQuantiles, Row, RowFile, Rows};

fn main() {
    divan::main();
}

/// Numbers of samples: a short run, what is collected without a file, and what is not.
const NUM_SAMPLES: [usize; 4] = [1_000, 10_000, 250_000, 4_000_000];

/// Latencies of 5 to 21.8 ms, scattered, one in sixteen up to 67 ms longer.
fn latency_ns(i: u64) -> u64 {
    let scattered = i.wrapping_mul(11_400_714_819_323_198_485);
    let longer = if scattered.is_multiple_of(16) { scattered >> 38 } else { 0 };
    5_000_000 + (scattered >> 40) + longer
}

fn latencies(num_samples: usize) -> Vec<u64> {
    (0..num_samples as u64).map(latency_ns).collect()
}

fn collect(latencies_ns: &[u64]) -> ExactQuantiles {
    let mut quantiles = ExactQuantiles::new(DEFAULT_MAX_BYTES);
    for &latency_ns in latencies_ns {
        quantiles.push(latency_ns, 1).expect("room for the samples");
    }
    quantiles
}

#[divan::bench(args = NUM_SAMPLES, max_time = 1)]
fn quantiles_push(bencher: Bencher, num_samples: usize) {
    let latencies_ns = latencies(num_samples);
    bencher.counter(ItemsCount::new(num_samples)).bench_local(|| collect(black_box(&latencies_ns)));
}

#[divan::bench(args = NUM_SAMPLES, max_time = 1)]
fn quantiles_finish(bencher: Bencher, num_samples: usize) {
    let latencies_ns = latencies(num_samples);
    bencher
        .counter(ItemsCount::new(num_samples))
        .with_inputs(|| collect(&latencies_ns))
        .bench_local_values(|quantiles| quantiles.finish(&[50.0, 90.0, 99.0]).expect("a distribution"));
}

/// What the two above replace: every sample in memory, sorted.
#[divan::bench(args = NUM_SAMPLES, max_time = 1)]
fn sorting_all_samples(bencher: Bencher, num_samples: usize) {
    let latencies_ns = latencies(num_samples);
    bencher.counter(ItemsCount::new(num_samples)).bench_local(|| {
        let mut sorted = black_box(&latencies_ns).clone();
        sorted.sort_unstable();
        sorted
    });
}

/// Takes every byte and keeps none: formatting alone.
struct Nowhere;

impl Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(black_box(bytes).len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn requests() -> Vec<RequestMetrics> {
    (0..10_000)
        .map(|i| {
            let arrival = Nanos(i * 1_000_003);
            let ttft = Nanos(latency_ns(i));
            RequestMetrics {
                request_id: i,
                arrival_time_ns: arrival,
                admitted_time_ns: Some(arrival + Nanos(500)),
                first_token_time_ns: Some(arrival + ttft),
                ttft_ns: Some(ttft),
                completion_time_ns: Some(arrival + ttft + Nanos(900_000_000)),
                num_prefill_tokens: (i % 4_000) as u32 + 1,
                num_decode_tokens: 200,
                num_decode_tokens_actual: 200,
                status: RequestStatus::Ok,
                backend: "plumbline".into(),
            }
        })
        .collect()
}

fn tokens() -> Vec<TokenMetrics> {
    (0..100_000)
        .map(|i| TokenMetrics {
            request_id: i / 200,
            token_index: (i % 200) as u32,
            token_time_ns: Nanos(300_000_000_000 + i * 23_757),
            token_latency_ns: Nanos(latency_ns(i)),
        })
        .collect()
}

/// Steps of one prefill chunk and 32 decodes.
fn steps() -> Vec<StepMetrics> {
    let prefill_chunks = vec![PrefillChunk { num_tokens: 512, context_len: 1_024 }];
    (0..2_000)
        .map(|i| StepMetrics {
            step_start_ns: Nanos(300_000_000_000 + i * 22_000_000),
            step_duration_ns: Nanos(latency_ns(i)),
            schedule_ns: Nanos(90_000 + i),
            batch: StepBatch {
                prefill_chunks: prefill_chunks.clone(),
                decode_contexts: (0..32).map(|seq| 900 + seq * 17 + i as u32).collect(),
            },
            requests: None,
            phases: None,
        })
        .collect()
}

fn format<R: Row>(bencher: Bencher, rows: &[R]) {
    bencher.counter(ItemsCount::new(rows.len())).bench_local(|| {
        let mut out = Rows::new(Nowhere);
        for row in black_box(rows) {
            out.push(row).expect("room");
        }
        out.finish().map(drop).expect("room");
    });
}

#[divan::bench]
fn format_request_rows(bencher: Bencher) {
    format(bencher, &requests());
}

#[divan::bench]
fn format_token_rows(bencher: Bencher) {
    format(bencher, &tokens());
}

#[divan::bench]
fn format_step_rows(bencher: Bencher) {
    format(bencher, &steps());
}

#[divan::bench(args = ["token_metrics.csv", "token_metrics.csv.zst"], max_time = 1)]
fn write_token_file(bencher: Bencher, name: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, rows) = (folder.path().join(name), tokens());
    bencher.counter(ItemsCount::new(rows.len())).bench_local(|| {
        let mut file = RowFile::create(&path).expect("a file");
        for row in black_box(&rows) {
            file.push(row).expect("room");
        }
        file.finish().expect("a name");
    });
}
