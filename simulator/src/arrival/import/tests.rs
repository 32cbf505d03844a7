//! Traces in every format, good and spoilt.

use plumbline_schema::{ContentStream, Workload};

use super::*;
use crate::arrival::{CountDistribution, Lengths, TraceOrder, WorkloadSpec};

const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
    2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:51.2224670,879,55\n";
const AZURE_2024: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
    2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,2399,6\n";
const MOONCAKE: &str = r#"{"timestamp": 27482, "input_length": 1200, "output_length": 52, "hash_ids": [46, 47, 2353]}
{"timestamp": 30535, "input_length": 1025, "output_length": 26, "hash_ids": [46, 47, 2366]}

{"timestamp": 30535.5, "input_length": 10, "output_length": 1, "hash_ids": []}
"#;
const BURSTGPT: &str = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
    5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,Conversation log\n118.5,GPT-4,417,276,693,API log\n";
const VIDUR: &str =
    "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.314579,4090,109\n4.541877,879,55\n";
const VIDUR_LENGTHS: &str =
    "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n290,905,1195,0.32\n";
const LENGTHS: &str = "id,prompt_len,output_len\na,7,9\nb,8,3\n";

fn as_is() -> ImportOptions {
    ImportOptions {
        limit: None,
        max_total_tokens: None,
        too_long: TooLongRow::Refuse,
        arrivals: ImportArrivals::Trace { rate_factor: 1.0 },
    }
}

fn poisson(rate_per_s: f64, seed: u64) -> ImportArrivals {
    ImportArrivals::Process { arrival: Arrival::Poisson { rate_per_s }, seed }
}

fn import_text(
    text: &str,
    format: TraceFormat,
    options: &ImportOptions,
) -> Result<(Workload, ImportCounts), String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace");
    std::fs::write(&path, text).unwrap();
    import(&path, format, options).map_err(|error| {
        let text = error.to_string();
        text.strip_prefix(folder.path().to_str().unwrap()).map_or(text.clone(), str::to_owned)
    })
}

/// Arrival in ns, prompt and output of each request.
fn rows(workload: &Workload) -> Vec<(u64, u32, u32)> {
    let row = |r: &WorkloadRequest| (r.arrival_time_ns.0, r.num_prefill_tokens, r.num_decode_tokens);
    workload.requests.iter().map(row).collect()
}

#[test]
fn each_format_gives_its_requests() {
    let read = |text, format| import_text(text, format, &as_is()).unwrap();
    let (azure, _) = read(AZURE, TraceFormat::Azure);
    assert_eq!(rows(&azure), [(0, 374, 44), (4_314_579_000, 396, 109), (4_541_877_000, 879, 55)]);
    let (azure, _) = read(AZURE_2024, TraceFormat::Azure);
    assert_eq!(rows(&azure), [(0, 2162, 5), (990_070_000, 2399, 6)]);
    let (vidur, _) = read(VIDUR, TraceFormat::Vidur);
    assert_eq!(rows(&vidur), [(0, 374, 44), (4_314_579_000, 4090, 109), (4_541_877_000, 879, 55)]);
    let (burst, counts) = read(BURSTGPT, TraceFormat::Burstgpt);
    assert_eq!(rows(&burst), [(0, 472, 18), (113_500_000_000, 417, 276)]);
    assert_eq!((counts.num_rows, counts.num_without_output), (3, 1));
    let (mooncake, _) = read(MOONCAKE, TraceFormat::Mooncake);
    assert_eq!(rows(&mooncake), [(0, 1200, 52), (3_053_000_000, 1025, 26), (3_053_500_000, 10, 1)]);
    let [first, second, last] = &mooncake.requests[..] else { panic!("three requests") };
    assert_eq!(first.content_run(1023), second.content_run(1023));
    assert_eq!(second.content_run(1024).stream, ContentStream::Hash(2366));
    assert_eq!(last.content, None);
    let own = azure.canonical_text();
    assert_eq!(rows(&read(&own, TraceFormat::Plumbline).0), rows(&azure));
}

#[test]
fn lengths_alone_need_a_process_of_arrivals() {
    for (text, format, expected) in [
        (VIDUR_LENGTHS, TraceFormat::Vidur, [(74, 918), (290, 905)]),
        (LENGTHS, TraceFormat::Lengths, [(7, 9), (8, 3)]),
    ] {
        let error = import_text(text, format, &as_is()).unwrap_err();
        assert!(error.starts_with("/trace, line 2: expected an arrival time"), "{error}");
        let options = ImportOptions { arrivals: poisson(2.0, 7), ..as_is() };
        let (workload, _) = import_text(text, format, &options).unwrap();
        let lengths: Vec<_> = rows(&workload).into_iter().map(|(_, p, d)| (p, d)).collect();
        assert_eq!(lengths, expected);
        // The same arrivals as a workload by rules has.
        let any = Lengths::Distributions {
            prefill: CountDistribution::Fixed { value: 1 },
            decode: CountDistribution::Fixed { value: 1 },
        };
        let made = WorkloadSpec::new(2, Arrival::Poisson { rate_per_s: 2.0 }, any).generate(7).unwrap();
        let times = |workload: &Workload| rows(workload).into_iter().map(|row| row.0).collect::<Vec<_>>();
        assert_eq!(times(&workload), times(&made));
    }
}

#[test]
fn what_is_too_long_is_refused_dropped_or_shortened() {
    let with = |too_long, max| {
        let options = ImportOptions { max_total_tokens: Some(max), too_long, ..as_is() };
        import_text(VIDUR, TraceFormat::Vidur, &options)
    };
    let error = with(TooLongRow::Refuse, 4096).unwrap_err();
    let expected =
        "/trace, line 3: expected prompt and output of at most 4096 tokens together, found 4090 and 109";
    assert_eq!(error, expected);
    let (dropped, counts) = with(TooLongRow::Drop, 4096).unwrap();
    assert_eq!(rows(&dropped), [(0, 374, 44), (4_541_877_000, 879, 55)]);
    assert_eq!((counts.num_rows, counts.num_dropped, counts.num_clamped), (3, 1, 0));
    assert_eq!(dropped.requests[1].request_id, 1);
    let (clamped, counts) = with(TooLongRow::Clamp, 4096).unwrap();
    assert_eq!(rows(&clamped)[1], (4_314_579_000, 3987, 109));
    assert_eq!((counts.num_dropped, counts.num_clamped), (0, 1));
    let (clamped, _) = with(TooLongRow::Clamp, 50).unwrap();
    assert_eq!(rows(&clamped), [(0, 6, 44), (4_314_579_000, 1, 49), (4_541_877_000, 1, 49)]);
    let error = with(TooLongRow::Drop, 10).unwrap_err();
    assert_eq!(error, "/trace: expected at least one request to import, found none (3 rows read)");
}

#[test]
fn a_limit_counts_what_is_kept_and_rates_scale_time() {
    let options = ImportOptions {
        limit: Some(2),
        max_total_tokens: Some(4096),
        too_long: TooLongRow::Drop,
        arrivals: ImportArrivals::Trace { rate_factor: 2.0 },
    };
    let (workload, _) = import_text(VIDUR, TraceFormat::Vidur, &options).unwrap();
    assert_eq!(rows(&workload), [(0, 374, 44), (2_270_938_500, 879, 55)]);
    let back = "arrived_at,num_prefill_tokens,num_decode_tokens\n5,1,1\n3,2,2\n4,3,3\n";
    let (workload, counts) = import_text(back, TraceFormat::Vidur, &as_is()).unwrap();
    assert_eq!(rows(&workload), [(0, 2, 2), (1_000_000_000, 3, 3), (2_000_000_000, 1, 1)]);
    assert_eq!(counts.num_reordered, 2);
}

#[test]
fn spoilt_traces_name_line_and_column() {
    let cases = [
        (
            TraceFormat::Azure,
            AZURE.replace("18:15:50", "25:15:50"),
            ", line 3, column `TIMESTAMP`: expected a time",
        ),
        (
            TraceFormat::Azure,
            AZURE.replace("396", "-1"),
            ", line 3, column `ContextTokens`: expected a whole number",
        ),
        (TraceFormat::Azure, VIDUR.to_owned(), ", line 1: expected a column `TIMESTAMP`"),
        (
            TraceFormat::Vidur,
            VIDUR.replace("4.31", "-4.31"),
            ", line 3, column `arrived_at`: expected a time of 0",
        ),
        (
            TraceFormat::Vidur,
            VIDUR.replace("4.314579", "nan"),
            ", line 3, column `arrived_at`: expected a time of 0",
        ),
        (TraceFormat::Vidur, VIDUR.replace("4.314579", ""), ", line 3: expected an arrival time"),
        (
            TraceFormat::Burstgpt,
            BURSTGPT.replace("472", "4e9"),
            ", line 2, column `Request tokens`: expected a whole",
        ),
        (TraceFormat::Lengths, LENGTHS.replace("prompt_len", "prompt"), ", line 1: expected a column"),
        (TraceFormat::Mooncake, MOONCAKE.replace("1025", "\"x\""), ", line 2: expected an object"),
        (
            TraceFormat::Mooncake,
            MOONCAKE.replace("1025", "1024"),
            ", line 2, column `hash_ids`: expected at most 2",
        ),
        (
            TraceFormat::Mooncake,
            MOONCAKE.replace("30535.5", "-1"),
            ", line 4, column `timestamp`: expected a time",
        ),
        (
            TraceFormat::Mooncake,
            String::new(),
            ": expected at least one request to import, found none (0 rows",
        ),
        (TraceFormat::Vidur, String::new(), ": expected at least one request to import, found none (0 rows"),
    ];
    for (format, text, says) in cases {
        let error = import_text(&text, format, &as_is()).unwrap_err();
        assert!(error.contains(says), "{error}, expected {says}");
    }
    let closed = Arrival::ClosedLoop { users: 1, think_time: None };
    let options = ImportOptions { arrivals: ImportArrivals::Process { arrival: closed, seed: 0 }, ..as_is() };
    assert!(import_text(VIDUR, TraceFormat::Vidur, &options).is_err());
    let options = ImportOptions { arrivals: poisson(f64::NAN, 0), ..as_is() };
    let error = import_text(VIDUR, TraceFormat::Vidur, &options).unwrap_err();
    assert!(error.starts_with("key `arrival.rate_per_s`: expected"), "{error}");
}

#[test]
fn a_specification_takes_lengths_and_times_of_traces() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("trace.csv"), VIDUR).unwrap();
    let write = |text: &str| {
        let path = folder.path().join("spec.toml");
        std::fs::write(&path, text).unwrap();
        path
    };
    let lengths = "[lengths]\nfrom = \"trace\"\npath = \"trace.csv\"\nformat = \"vidur\"\n";
    let trace = "[arrival]\nprocess = \"trace\"\npath = \"trace.csv\"\nformat = \"vidur\"\nrate_factor = 2\n";
    let both = WorkloadSpec::read(&write(&format!("{trace}{lengths}"))).unwrap();
    let expected = [(0, 374, 44), (2_157_289_500, 4090, 109), (2_270_938_500, 879, 55)];
    assert_eq!(rows(&both.generate(0).unwrap()), expected);
    // A request is left out with its time, or the next pair takes its time.
    let limited = |too_long: &str| {
        let text = format!("max_total_tokens = 4096\ntoo_long = \"{too_long}\"\n{trace}{lengths}");
        rows(&WorkloadSpec::read(&write(&text)).unwrap().generate(0).unwrap())
    };
    assert_eq!(limited("drop"), [expected[0], expected[2]]);
    assert_eq!(limited("resample"), [expected[0], (2_157_289_500, 879, 55)]);
    let sampled =
        format!("num_requests = 500\n[arrival]\nprocess = \"static\"\n{lengths}order = \"sampled\"\n");
    let sampled = WorkloadSpec::read(&write(&sampled)).unwrap().generate(0).unwrap();
    let of_trace = [(0, 374, 44), (0, 4090, 109), (0, 879, 55)];
    assert!(of_trace.iter().all(|row| rows(&sampled).iter().filter(|found| *found == row).count() > 100));
    let shuffled = Lengths::Trace {
        path: folder.path().join("trace.csv"),
        format: TraceFormat::Vidur,
        order: TraceOrder::Shuffled,
    };
    let mut drawn = rows(&WorkloadSpec::new(3, Arrival::Static {}, shuffled.clone()).generate(0).unwrap());
    drawn.sort_unstable_by_key(|row| row.1);
    assert_eq!(drawn, [(0, 374, 44), (0, 879, 55), (0, 4090, 109)]);
    let error = WorkloadSpec::new(4, Arrival::Static {}, shuffled).generate(0).unwrap_err().to_string();
    assert_eq!(error, "key `num_requests`: expected at most 3, after which the trace ends, found 4");
}

#[test]
fn specifications_name_the_key_and_what_was_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("spec.toml");
    let good = "num_requests = 5\nmax_total_tokens = 100\ntoo_long = \"clamp\"\n\
        [arrival]\nprocess = \"poisson\"\nrate_per_s = 2\n[lengths]\nfrom = \"distributions\"\n\
        prefill = { distribution = \"uniform\", min = 1, max = 9 }\ndecode = { distribution = \"fixed\", value = 3 }\n\
        [sessions]\nturns = { distribution = \"fixed\", value = 2 }\n\
        think_time = { distribution = \"fixed\", value_s = 0.5 }\n[prefixes]\ncount = 2\ntokens = 8\n\
        [[priorities]]\npriority = 1\nweight = 2\n";
    std::fs::write(&path, good).unwrap();
    let spec = WorkloadSpec::read(&path).unwrap();
    let json = folder.path().join("spec.json");
    std::fs::write(&json, serde_json::to_string(&spec).unwrap()).unwrap();
    assert_eq!(WorkloadSpec::read(&json).unwrap(), spec);
    for (from, to, says) in [
        ("num_requests = 5\n", "", "key `num_requests`: expected a number of requests, for without it"),
        ("num_requests = 5", "num_requests = 0", "key `num_requests`: expected at least 1, found 0"),
        (
            "= 100\n",
            "= 11\n",
            "key `max_total_tokens`: expected at least 12, which the shortest request has, found 11",
        ),
        ("\"clamp\"", "\"resample\"", "key `too_long`: expected `drop` or `clamp`"),
        ("\"clamp\"", "\"cut\"", "line 3: expected a workload specification, found unknown variant `cut`"),
        (
            "rate_per_s = 2",
            "rate_per_s = 0",
            "key `arrival.rate_per_s`: expected 0.000001 to 1000000000 requests/s, found 0",
        ),
        ("rate_per_s = 2", "rate_per_s = nan", "key `arrival.rate_per_s`"),
        ("rate_per_s = 2", "rate_per_s = 2\nrate = 3", "unknown field `rate`"),
        ("\"poisson\"\nrate_per_s = 2", "\"static\"\nrate_per_s = 2", "unknown field `rate_per_s`"),
        ("max = 9", "max = 0", "key `lengths.prefill.max`: expected 1 (`min`) to 1073741824, found 0"),
        ("value = 3", "value = 0", "key `lengths.decode.value`: expected 1 to 1073741824, found 0"),
        ("value = 2", "value = 200000", "key `sessions.turns.value`: expected 1 to 100000, found 200000"),
        (
            "value_s = 0.5",
            "value_s = -1",
            "key `sessions.think_time.value_s`: expected 0 to 1000000000, found -1",
        ),
        ("tokens = 8", "tokens = 0", "key `prefixes.tokens`: expected 1 to"),
        ("weight = 2", "weight = 0", "key `priorities[0].weight`: expected a finite weight above 0, found 0"),
        ("[prefixes]", "[prefix]", "unknown field `prefix`"),
    ] {
        assert!(good.contains(from), "{from}");
        std::fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let error = WorkloadSpec::read(&path).unwrap_err().to_string();
        assert!(error.contains("spec.toml, ") && error.contains(says), "{error}, expected {says}");
    }
    for (arrival, key) in [
        ("process = \"gamma\"\nrate_per_s = 1\ncv = 0", "arrival.cv"),
        ("process = \"diurnal\"\nmean_rate_per_s = 1\namplitude = 1.5\nperiod_s = 9", "arrival.amplitude"),
        ("process = \"rate_table\"\nrates = []", "arrival.rates"),
        ("process = \"rate_table\"\nrates = [{ from_s = 0, rate_per_s = 0 }]", "arrival.rates"),
        ("process = \"rate_table\"\nperiod_s = 1\nrates = [{ from_s = 0, rate_per_s = 0 }]", "arrival.rates"),
        (
            "process = \"rate_table\"\nrates = [{ from_s = 0, rate_per_s = 1 }, { from_s = 0, rate_per_s = 2 }]",
            "arrival.rates[1].from_s",
        ),
        (
            "process = \"burst\"\non_rate_per_s = 0.001\nmean_on_s = 0.001\nmean_off_s = 1",
            "arrival.mean_on_s",
        ),
        ("process = \"closed_loop\"\nusers = 0", "arrival.users"),
        ("process = \"fixed\"\ninterval_s = 0", "arrival.interval_s"),
    ] {
        std::fs::write(&path, good.replacen("process = \"poisson\"\nrate_per_s = 2", arrival, 1)).unwrap();
        let error = WorkloadSpec::read(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("key `{key}`")), "{error}, expected {key}");
    }
}

#[test]
fn limits_that_no_request_keeps_are_refused_and_never_searched_for() {
    let lengths = Lengths::Distributions {
        prefill: CountDistribution::Zipf { min: 1, max: 1_000_000, exponent: 0.0 },
        decode: CountDistribution::Fixed { value: 1 },
    };
    let spec =
        WorkloadSpec { max_total_tokens: Some(2), ..WorkloadSpec::new(5, Arrival::Static {}, lengths) };
    let error = spec.generate(0).unwrap_err().to_string();
    assert!(
        error.contains("key `max_total_tokens`: expected a limit that one in 10000 requests keeps"),
        "{error}"
    );
    let bounds = CountDistribution::LogNormal { median: 10.0, sigma: 0.1, min: 1000, max: None };
    let lengths = Lengths::Distributions { prefill: bounds.clone(), decode: bounds };
    let error = WorkloadSpec::new(5, Arrival::Static {}, lengths).generate(0).unwrap_err().to_string();
    assert!(error.contains("key `lengths.prefill`: expected bounds between which"), "{error}");
}
