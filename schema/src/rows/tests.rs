use proptest::{collection::vec, option, prelude::*};
use serde::Serialize;

use super::*;
use crate::{
    batch::{PrefillChunk, StepBatch},
    run::{RequestStatus, StepRequests},
};

/// What serde and `csv` write for a step: the format's columns in order.
#[derive(Serialize)]
struct StepColumns {
    step_start_ns: Nanos,
    step_duration_ns: Nanos,
    schedule_ns: Nanos,
    num_prefill_seqs: u32,
    num_prefill_tokens: u32,
    num_decode_seqs: u32,
    prefill_chunks_tokens_context: String,
    decode_contexts: String,
    prefill_request_ids: String,
    decode_request_ids: String,
    preempted_request_ids: String,
    free_blocks: Option<u32>,
}

impl From<&StepMetrics> for StepColumns {
    fn from(step: &StepMetrics) -> Self {
        let load = step.batch.shape().attention;
        let requests = step.requests.clone().unwrap_or_default();
        let joined = |ids: Vec<u64>| ids.iter().map(u64::to_string).collect::<Vec<_>>().join(";");
        Self {
            step_start_ns: step.step_start_ns,
            step_duration_ns: step.step_duration_ns,
            schedule_ns: step.schedule_ns,
            num_prefill_seqs: load.num_prefill_seqs,
            num_prefill_tokens: load.num_prefill_tokens,
            num_decode_seqs: load.num_decode_seqs,
            prefill_chunks_tokens_context: step.batch.format_prefill_chunks(),
            decode_contexts: step.batch.format_decode_contexts(),
            prefill_request_ids: joined(requests.prefill_request_ids),
            decode_request_ids: joined(requests.decode_request_ids),
            preempted_request_ids: joined(requests.preempted_request_ids),
            free_blocks: requests.free_blocks,
        }
    }
}

fn by_serde<T: Serialize>(rows: impl IntoIterator<Item = T>) -> String {
    let mut writer = csv::Writer::from_writer(Vec::new());
    rows.into_iter().for_each(|row| writer.serialize(row).unwrap());
    String::from_utf8(writer.into_inner().unwrap()).unwrap()
}

fn by_rows<R: Row>(rows: &[R]) -> String {
    let mut out = Rows::new(Vec::new());
    for row in rows {
        out.push(row).unwrap();
    }
    assert_eq!(out.num_rows(), rows.len() as u64);
    String::from_utf8(out.finish().unwrap()).unwrap()
}

fn nanos() -> impl Strategy<Value = Nanos> {
    prop_oneof![any::<u64>(), 0..20_u64, Just(u64::MAX)].prop_map(Nanos)
}

fn request() -> impl Strategy<Value = RequestMetrics> {
    let status =
        prop::sample::select(vec![RequestStatus::Ok, RequestStatus::Rejected, RequestStatus::Incomplete]);
    // What a reader takes for something else, and anything.
    let backend = prop_oneof!["[ab,\"\r\n;#' \t]{0,6}", any::<String>(), Just("plumbline".to_owned())];
    (
        any::<u64>(),
        nanos(),
        [(); 4].map(|()| option::of(nanos())),
        [(); 3].map(|()| any::<u32>()),
        status,
        backend,
    )
        .prop_map(|(request_id, arrival_time_ns, times, counts, status, backend)| RequestMetrics {
            request_id,
            arrival_time_ns,
            admitted_time_ns: times[0],
            first_token_time_ns: times[1],
            ttft_ns: times[2],
            completion_time_ns: times[3],
            num_prefill_tokens: counts[0],
            num_decode_tokens: counts[1],
            num_decode_tokens_actual: counts[2],
            status,
            backend,
        })
}

fn token() -> impl Strategy<Value = TokenMetrics> {
    (any::<u64>(), any::<u32>(), nanos(), nanos()).prop_map(
        |(request_id, token_index, token_time_ns, token_latency_ns)| TokenMetrics {
            request_id,
            token_index,
            token_time_ns,
            token_latency_ns,
        },
    )
}

fn step() -> impl Strategy<Value = StepMetrics> {
    let chunk = (any::<u32>(), any::<u32>())
        .prop_map(|(num_tokens, context_len)| PrefillChunk { num_tokens, context_len });
    let ids = || vec(any::<u64>(), 0..4);
    let requests = (ids(), ids(), ids(), option::of(any::<u32>())).prop_map(
        |(prefill_request_ids, decode_request_ids, preempted_request_ids, free_blocks)| StepRequests {
            prefill_request_ids,
            decode_request_ids,
            preempted_request_ids,
            free_blocks,
        },
    );
    let times = (nanos(), nanos(), nanos());
    (times, vec(chunk, 0..4), vec(any::<u32>(), 0..9), option::of(requests)).prop_map(
        |((step_start_ns, step_duration_ns, schedule_ns), prefill_chunks, decode_contexts, requests)| {
            StepMetrics {
                step_start_ns,
                step_duration_ns,
                schedule_ns,
                batch: StepBatch { prefill_chunks, decode_contexts },
                requests,
                phases: None,
            }
        },
    )
}

proptest! {
    #[test]
    fn request_rows_are_serdes_bytes(rows in vec(request(), 0..8)) {
        prop_assert_eq!(by_rows(&rows), by_serde(&rows));
    }

    #[test]
    fn token_rows_are_serdes_bytes(rows in vec(token(), 0..8)) {
        prop_assert_eq!(by_rows(&rows), by_serde(&rows));
    }

    #[test]
    fn step_rows_are_serdes_bytes(rows in vec(step(), 0..8)) {
        prop_assert_eq!(by_rows(&rows), by_serde(rows.iter().map(StepColumns::from)));
    }
}

fn tokens(count: u32) -> Vec<TokenMetrics> {
    (0..count)
        .map(|i| TokenMetrics {
            request_id: u64::from(i / 100),
            token_index: i % 100,
            token_time_ns: Nanos(u64::from(i) * 7_919),
            token_latency_ns: Nanos(u64::from(i % 100) * 31),
        })
        .collect()
}

#[test]
fn files_hold_the_same_bytes_over_many_pieces_plain_and_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let rows = tokens(20_000);
    let expected = by_serde(&rows);
    assert!(expected.len() > 4 * CHUNK_BYTES, "{}", expected.len());
    let plain = folder.path().join("new/token_metrics.csv");
    write_rows(&plain, &rows).unwrap();
    assert_eq!(std::fs::read_to_string(&plain).unwrap(), expected);
    let compressed = folder.path().join("new/token_metrics.csv.zst");
    write_rows(&compressed, &rows).unwrap();
    let bytes = std::fs::read(&compressed).unwrap();
    assert!(bytes.len() * 2 < expected.len(), "{} of {}", bytes.len(), expected.len());
    assert_eq!(zstd::decode_all(&bytes[..]).unwrap(), expected.as_bytes());
}

#[test]
fn a_file_appears_when_finished_and_a_dropped_one_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token_metrics.csv");
    let names =
        || std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
    std::fs::write(&path, "before").unwrap();
    for name in ["token_metrics.csv", "token_metrics.csv.zst"] {
        let mut file = RowFile::create(&folder.path().join(name)).unwrap();
        for row in &tokens(9_000) {
            file.push(row).unwrap();
        }
        assert_eq!(file.num_rows(), 9_000);
        assert_eq!(names().len(), 2, "one under a temporary name");
        drop(file);
        assert_eq!(names(), ["token_metrics.csv"]);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before");
    }
    let mut file = RowFile::create(&path).unwrap();
    file.push(&tokens(1)[0]).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "before");
    file.finish().unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), by_serde(tokens(1)));
    assert_eq!(names().len(), 1);
}

#[test]
fn a_file_that_cannot_be_named_says_which() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token_metrics.csv");
    // A folder stands in the way.
    std::fs::create_dir_all(path.join("below")).unwrap();
    let error = write_rows(&path, &tokens(1)).unwrap_err().to_string();
    assert!(error.starts_with(path.to_str().unwrap()), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    std::fs::write(folder.path().join("file"), "").unwrap();
    assert!(RowFile::<TokenMetrics>::create(&folder.path().join("file/token_metrics.csv")).is_err());
}

/// A disk with room for so many bytes.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.0);
        self.0 -= taken;
        if taken == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(taken) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn rows_that_did_not_arrive_are_not_forgotten() {
    let rows = tokens(20_000);
    let mut out = Rows::new(Full(100_000));
    let pushed: Vec<_> = rows.iter().map(|row| out.push(row)).collect();
    let kinds: Vec<_> = pushed.into_iter().filter_map(Result::err).map(|e| e.kind()).collect();
    assert_eq!(kinds[0], io::ErrorKind::StorageFull);
    assert!(kinds.len() > 1, "later pieces fail too");
    assert!(out.line.text.capacity() <= 2 * CHUNK_BYTES, "what cannot be written is not kept");
    out.out.0 = usize::MAX;
    assert!(out.finish().is_err(), "a hole in the rows, though there is room again");
    let mut out = Rows::new(Full(100));
    rows[..100].iter().for_each(|row| out.push(row).unwrap());
    assert!(out.finish().is_err(), "the last rows");
}
