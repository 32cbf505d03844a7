//! `plumb bundle diff` and `plumb bundle stats`: has a machine drifted?

use std::path::{Path, PathBuf};

use plumbline_bundles::{
    Bundle, BundleDiff,
    diff::{self, Comparison, Difference, MovedPoint, OperatorDiff, Overall, Side},
};
use plumbline_schema::Nanos;
use serde::Serialize;

use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text, percent},
};

/// Tell drift of the hardware from noise: compare two profiles, operator by operator
///
/// Points of the same operator, shape, sequences and cache state are paired. An operator is `same` when the 95 % interval of its
/// median ratio B/A lies inside 2 % of 1, `slower` or `faster` when the ratio lies outside and a signed-rank test corrected for
/// all operators agrees, else `noisy`; `missing` when there is nothing to pair. What differs between the machines is listed
/// beside. Exit codes: 0 every operator is the same, 3 one drifted, 5 none drifted but one is noisy or missing.
#[derive(Debug, clap::Args)]
pub struct DiffArgs {
    /// The earlier profile: a bundle folder, the name of a shipped bundle, or a file of `plumb bundle stats`
    a: String,

    /// The later profile, the same
    b: String,

    /// Seed of the resamples behind the intervals
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Write the statistics of a bundle's points that `plumb bundle diff` needs, in one small file
#[derive(Debug, clap::Args)]
pub struct StatsArgs {
    /// Bundle folder, or the name of a shipped bundle
    bundle: String,

    /// File to write, ending in .csv or .csv.zst; one that is there is replaced
    #[arg(long, value_name = "FILE", value_parser = parse_stats_file)]
    out: PathBuf,
}

fn parse_stats_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if diff::is_stats_file(&path) {
        Ok(path)
    } else {
        Err("expected a name ending in .csv or .csv.zst".into())
    }
}

#[derive(Serialize)]
struct StatsReport {
    file: String,
    num_points: usize,
}

/// Runs `plumb bundle stats`.
///
/// # Errors
/// When the bundle's samples cannot be read, or the file cannot be written.
pub fn run_stats(args: &StatsArgs, output: Output) -> Result<Exit, Failure> {
    let samples = Bundle::open(&data::bundle(&args.bundle)?)?.samples()?;
    diff::write_stats(&args.out, &samples)?;
    let file = args.out.display().to_string();
    let report = StatsReport { file, num_points: diff::read_stats(&args.out)?.len() };
    output.print(&report, || format!("{} points in {}", report.num_points, report.file))?;
    Ok(Exit::Fine)
}

/// Runs `plumb bundle diff`.
///
/// # Errors
/// When a side cannot be read.
pub fn run_diff(args: &DiffArgs, output: Output) -> Result<Exit, Failure> {
    let diff = BundleDiff::between(&side(&args.a)?, &side(&args.b)?, args.seed);
    output.print(&diff, || text(&diff))?;
    Ok(match diff.verdict {
        Overall::Same => Exit::Fine,
        Overall::Drift => Exit::OutsideTolerance,
        Overall::Unclear => Exit::Incomplete,
    })
}

fn side(name_or_path: &str) -> Result<Side, Failure> {
    let path = Path::new(name_or_path);
    // A shipped bundle has a name of its own, never one of a file.
    let path = if diff::is_stats_file(path) { path.into() } else { data::bundle(name_or_path)? };
    Ok(Side::open(&path)?)
}

fn text(diff: &BundleDiff) -> String {
    let mut text = Text::default();
    text.line(format_args!("A: {}\nB: {}\n", diff.a, diff.b));
    let mut table =
        |title: &str, table: &Table| text.line(format_args!("{title}{}", table.to_string().trim_end()));
    table("", &operators_table(&diff.operators));
    if !diff.differences.is_empty() {
        table("\nWhat differs between the machines\n", &differences_table(&diff.differences));
    }
    if !diff.moved.is_empty() {
        table("\nPoints that moved most\n", &moved_table(&diff.moved));
    }
    text.line("");
    for operator in &diff.operators {
        if let Some(remark) = &operator.remark {
            text.line(format_args!("{}: {}: {remark}", operator.operator, operator.verdict.name()));
        }
    }
    for note in &diff.notes {
        text.line(format_args!("note: {note}"));
    }
    text.line(match diff.verdict {
        Overall::Same => "same",
        Overall::Drift => "drift",
        Overall::Unclear => "unclear: no drift found, and not every operator can be told",
    });
    text.finish()
}

fn operators_table(operators: &[OperatorDiff]) -> Table {
    let mut table = Table::new(&[
        "operator",
        "verdict",
        ">common",
        ">only A",
        ">only B",
        ">B/A",
        ">95 % interval",
        ">in 2 %",
        ">in 5 %",
        ">in 10 %",
        ">scatter",
        ">clock B/A",
        ">p",
    ]);
    for operator in operators {
        let counts = [operator.num_common, operator.num_only_a, operator.num_only_b];
        let mut row = vec![operator.operator.to_string(), operator.verdict.name().to_owned()];
        row.extend(counts.map(|n| n.to_string()));
        row.extend(match &operator.comparison {
            Some(comparison) => comparison_cells(comparison),
            None => std::array::from_fn(|_| "-".to_owned()),
        });
        table.row(row);
    }
    table
}

fn comparison_cells(c: &Comparison) -> [String; 8] {
    let share = |share: f64| format!("{:.0} %", 100.0 * share);
    [
        format!("{:.4}", c.ratio),
        format!("{:.4}..{:.4}", c.ratio_low, c.ratio_high),
        share(c.share_within_2_pct),
        share(c.share_within_5_pct),
        share(c.share_within_10_pct),
        percent(c.between_run_sigma),
        c.sm_clock_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}")),
        format!("{:.3}", c.p_value_corrected),
    ]
}

fn differences_table(differences: &[Difference]) -> Table {
    let mut table = Table::new(&["", ">A", ">B", ">B/A"]);
    for difference in differences {
        let is_hash = difference.fact == "kernel_hash";
        let shown = |value: &Option<String>| match value {
            Some(hash) if is_hash => hash.chars().take(12).collect(),
            Some(value) => value.clone(),
            None => "-".to_owned(),
        };
        let ratio = difference.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
        table.row([difference.fact.clone(), shown(&difference.a), shown(&difference.b), ratio]);
    }
    table
}

/// The shape in few letters: attention has ten numbers.
fn short_shape(point: &MovedPoint) -> String {
    const SHORT: [(&str, &str); 10] = [
        ("num_q_heads", "q"),
        ("num_kv_heads", "kv"),
        ("head_dim", "dim"),
        ("num_prefill_seqs", "prefills"),
        ("num_prefill_tokens", "tokens"),
        ("prefill_kv_tokens", "keys"),
        ("prefill_pairs", "pairs"),
        ("num_decode_seqs", "decodes"),
        ("max_decode_kv_tokens", "longest"),
        ("decode_kv_tokens", "keys"),
    ];
    SHORT.iter().fold(point.shape.clone(), |text, (name, short)| text.replace(name, short))
}

fn moved_table(moved: &[MovedPoint]) -> Table {
    let mut table =
        Table::new(&["operator", "shape", "cache", ">A", ">B", ">B/A", ">clock A", ">clock B", "kernel"]);
    for point in moved {
        let time = |ns: f64| Nanos::from_f64(ns).to_string();
        let clock = |mhz: Option<u32>| mhz.map_or_else(|| "-".to_owned(), |mhz| mhz.to_string());
        table.row([
            point.operator.to_string(),
            short_shape(point),
            point.cache.name().to_owned(),
            time(point.p50_a_ns),
            time(point.p50_b_ns),
            format!("{:.3}", point.ratio),
            clock(point.sm_clock_a_mhz),
            clock(point.sm_clock_b_mhz),
            if point.kernels.is_some() { "changed" } else { "" }.to_owned(),
        ]);
    }
    table
}
