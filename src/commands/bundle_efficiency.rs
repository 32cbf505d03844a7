//! `plumb bundle efficiency`: what the measured operators reach.

use plumbline_bundles::{
    Bundle, Efficiency,
    efficiency::{
        Bound, Ceilings, OperatorEfficiency, Rate,
        peers::{Comparison, Ours, Peer, Verdict},
    },
    predictor::Provenance,
};
use plumbline_schema::Nanos;

use crate::{
    data,
    exit::Exit,
    failure::Failure,
    output::{Output, Table, Text},
};

/// Say how near the operators come to this card's own ceilings, and to the kernels of an engine
///
/// Ceilings are the rates of a large device copy and of a large matrix product, measured with the bundle. Large inputs
/// are judged: prefills of prompts of 8,192 to 16,384 tokens, decodes over 1 GB of keys and values, elementwise
/// operators that move more than twice the L2 cache, matrix products of 2,048 tokens or more.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Bundle folder, or the name of a shipped bundle
    bundle: String,
}

/// Runs the verb.
///
/// # Errors
/// When the bundle cannot be read, or holds no measured ceilings.
pub fn run(args: &Args, output: Output) -> Result<Exit, Failure> {
    let efficiency = Efficiency::of(&Bundle::open(&data::bundle(&args.bundle)?)?)?;
    output.print(&efficiency, || text(&efficiency))?;
    Ok(Exit::Fine)
}

/// Sequences of a batch that are named before the rest is left out.
const MAX_NAMED_SEQUENCES: usize = 3;

/// What the operators reach, against this card's ceilings and an engine's kernels.
fn text(efficiency: &Efficiency) -> String {
    let mut text = Text::default();
    text.line(shares(efficiency));
    if let Some(first) = efficiency.peers.first() {
        text.line(format_args!("Against the kernels of {} ({}):", first.peer.engine, first.peer.model));
        text.line(peers(&efficiency.peers));
        text.line(PEERS_LEGEND);
    }
    text.finish()
}

const PEERS_LEGEND: &str = "\
ours: median time of a launch in a graph; theirs: the kernels' own durations; level: within 3 % or 0.3 us; period: of
theirs, from the end of the launch before, where a graph ran; warm: what the L2 cache held of theirs.";

/// The shares of the ceilings alone, as `plumb profile` closes with.
#[must_use]
pub fn shares(efficiency: &Efficiency) -> String {
    let mut text = Text::default();
    let Ceilings { copy_bandwidth_bytes_per_s, matmul_flops_per_s, .. } = efficiency.ceilings;
    text.line(format_args!(
        "Share of what this card reached in a device copy ({:.3} TB/s) and a matrix product ({:.0} TFLOP/s), large inputs:",
        copy_bandwidth_bytes_per_s / 1e12,
        matmul_flops_per_s / 1e12
    ));
    text.line(shares_table(&efficiency.operators));
    if !efficiency.without_large.is_empty() {
        let names: Vec<_> = efficiency.without_large.iter().map(|operator| operator.name()).collect();
        text.line(format_args!("no large input measured: {}", names.join(", ")));
    }
    text.finish()
}

fn shares_table(operators: &[OperatorEfficiency]) -> Table {
    let mut table = Table::new(&[
        "operator",
        "large",
        "of",
        ">points",
        ">best",
        ">median",
        ">worst",
        ">target",
        "median at",
        "worst at",
    ]);
    for row in operators {
        let target = match (row.target, row.is_met) {
            (Some(target), Some(true)) => format!("{} ✓", whole_percent(target)),
            (Some(target), _) => format!("{} ✗", whole_percent(target)),
            _ => "-".into(),
        };
        let throttled =
            if row.num_throttled > 0 { format!(" ({} throttled)", row.num_throttled) } else { String::new() };
        table.row([
            row.operator.to_string(),
            row.class.to_string(),
            row.bound.name().into(),
            format!("{}{throttled}", row.num_large),
            share(&row.best),
            share(&row.median),
            share(&row.worst),
            target,
            point(&row.median),
            point(&row.worst),
        ]);
    }
    table
}

fn whole_percent(ratio: f64) -> String {
    format!("{:.0} %", 100.0 * ratio)
}

fn share(rate: &Rate) -> String {
    rate.share.map_or_else(|| "-".into(), |share| format!("{:.1} %", 100.0 * share))
}

/// Shape, state and rate of one point.
fn point(rate: &Rate) -> String {
    let shape = if rate.prefill_chunks_tokens_context.is_empty() && rate.decode_contexts.is_empty() {
        rate.shape.iter().map(u64::to_string).collect::<Vec<_>>().join("x")
    } else {
        let heads: Vec<_> = rate.shape.iter().take(3).map(u64::to_string).collect();
        format!(
            "{} {}",
            heads.join("x"),
            sequences(&rate.prefill_chunks_tokens_context, &rate.decode_contexts)
        )
    };
    let speed = match rate.bound {
        Bound::Copy => format!("{:.2} TB/s", rate.bytes_per_s / 1e12),
        Bound::Matmul => format!("{:.0} TFLOP/s", rate.flops_per_s / 1e12),
    };
    format!("{shape} {}, {speed}", rate.cache.name())
}

/// The sequences of a batch; runs of equal ones are counted.
fn sequences(chunks: &str, contexts: &str) -> String {
    let counted = |list: &str, name: &str| {
        let mut runs: Vec<(usize, &str)> = Vec::new();
        for item in list.split(';').filter(|item| !item.is_empty()) {
            match runs.last_mut() {
                Some((count, last)) if *last == item => *count += 1,
                _ => runs.push((1, item)),
            }
        }
        let named = |&(count, item): &(usize, &str)| {
            if count > 1 { format!("{count}*{item}") } else { item.to_owned() }
        };
        let mut parts: Vec<_> = runs.iter().take(MAX_NAMED_SEQUENCES).map(named).collect();
        if runs.len() > MAX_NAMED_SEQUENCES {
            parts.push("...".into());
        }
        if parts.is_empty() { None } else { Some(format!("{name} {}", parts.join(","))) }
    };
    let both = [counted(chunks, "prefill"), counted(contexts, "decode")];
    both.into_iter().flatten().collect::<Vec<_>>().join(" + ")
}

fn peers(rows: &[Comparison]) -> Table {
    let mut table =
        Table::new(&["phase", "operator", ">ours", ">theirs", ">period", "verdict", "ours is", "theirs is"]);
    let time = |ns: f64| Nanos::from_f64(ns).to_string();
    let or_dash = |ns: Option<f64>| ns.map_or_else(|| "-".into(), time);
    for row in rows {
        let ours = row.ours.as_ref();
        table.row([
            row.peer.phase.clone(),
            operators(&row.peer),
            or_dash(ours.map(|ours| ours.time_ns)),
            time(row.peer.median_ns),
            or_dash(row.peer.median_period_ns),
            verdict(row.verdict),
            ours.map(state).unwrap_or_default(),
            theirs(&row.peer),
        ]);
    }
    table
}

fn operators(peer: &Peer) -> String {
    let names: Vec<_> = peer.parts.iter().map(|part| part.operator.name()).collect();
    let sequences = sequences(&peer.prefill_chunks_tokens_context, &peer.decode_contexts);
    if sequences.is_empty() { names.join("+") } else { format!("{} {sequences}", names.join("+")) }
}

/// Where our time comes from: state and marks of a measured one, the tag of a predicted one.
fn state(ours: &Ours) -> String {
    let mut parts = Vec::new();
    if ours.provenance != Provenance::Measured {
        parts.push(
            match ours.provenance {
                Provenance::Interpolated => "interpolated",
                _ => "extrapolated",
            }
            .to_owned(),
        );
    }
    parts.extend([&ours.cache, &ours.flags].into_iter().filter(|text| !text.is_empty()).cloned());
    if let (false, Some(mhz)) = (ours.flags.is_empty(), ours.sm_clock_mhz) {
        parts.push(format!("{mhz} MHz"));
    }
    parts.join(", ")
}

/// What the cache held of theirs, and what else differs.
fn theirs(peer: &Peer) -> String {
    let warm = if peer.warm == "none" { "cold".to_owned() } else { format!("warm {}", peer.warm) };
    if peer.note.is_empty() { warm } else { format!("{warm}; {}", peer.note) }
}

fn verdict(verdict: Verdict) -> String {
    match verdict {
        Verdict::Faster { percent } => format!("faster by {percent:.0} %"),
        Verdict::Level => "level".into(),
        Verdict::Slower { percent } => format!("slower by {percent:.0} %"),
        Verdict::NotMeasured => "not measured".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_sequences_are_counted() {
        assert_eq!(sequences("512:0;512:0;508:0", "9;9;9"), "prefill 2*512:0,508:0 + decode 3*9");
        assert_eq!(sequences("", "1;2;3;4"), "decode 1,2,3,...");
        assert_eq!(sequences("", ""), "");
    }
}
