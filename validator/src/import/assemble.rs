//! Records to a run: arrivals, numbers, token times, notes.

use std::{collections::HashMap, path::Path};

use plumbline_bundles::bundle::sha256_hex;
use plumbline_schema::{
    ArrivalBasis, InputError, Location, Nanos, RequestMetrics, RequestStatus, Run, RunInfo, RunKind,
    RunSource, TokenMetrics,
};

use super::{
    ImportOptions, Imported, ResultFormat, figures,
    record::{Parsed, Record},
    schedule,
};

/// Of neighbouring gaps so many may be the same to the nanosecond by chance; more were split up by the tool.
const MAX_SHARE_OF_EQUAL_GAPS: f64 = 0.01;

/// Arrival and sending of each record from the start of the run, and what they mean.
struct Times {
    arrivals: Vec<Nanos>,
    sent: Vec<Nanos>,
    basis: ArrivalBasis,
}

/// Makes the run.
pub(super) fn assemble(
    path: &Path,
    format: ResultFormat,
    mut parsed: Parsed,
    options: &ImportOptions,
) -> Result<Imported, InputError> {
    if parsed.records.is_empty() {
        return Err(InputError::invalid(path, Location::File, "at least one request", "none"));
    }
    if parsed.by_arrival {
        parsed.records.sort_by_key(|record| record.scheduled.or(record.sent));
    }
    check(path, &parsed.records)?;
    let mut notes = std::mem::take(&mut parsed.notes);
    let has_token_times = find_token_times(&parsed.records, &mut notes);
    let own = own_times(path, &parsed, options.schedule.is_some())?;
    let info = info(path, format, &parsed, options, own.basis);
    let mut run = build(info, &parsed.records, &own, has_token_times);
    let as_sent = Times { arrivals: own.sent.clone(), sent: own.sent.clone(), basis: ArrivalBasis::Sent };
    let figures = if own.arrivals == own.sent {
        figures::check(format.name(), &parsed, &run)
    } else {
        let run = build(run.info.clone(), &parsed.records, &as_sent, has_token_times);
        figures::check(format.name(), &parsed, &run)
    };
    if let Some(path) = &options.schedule {
        let times = schedule_times(path, &mut parsed.records, &own, parsed.arrivals, &mut notes)?;
        run.info.source.iter_mut().for_each(|source| source.arrivals = times.basis);
        run = build(run.info, &parsed.records, &times, has_token_times);
    }
    notes.extend(figures::warnings(&figures));
    if let Some((names, reason)) = parsed.unchecked.filter(|_| !figures.is_empty()) {
        notes.push(format!("{} cannot be computed anew: {reason}", names.join(" and ")));
    }
    note_unfinished(&parsed.records, &mut notes);
    note_model(&parsed, options, &mut notes);
    if let Some(source) = &mut run.info.source {
        source.notes = notes;
    }
    run.info.workload_digest = workload_digest(&run);
    Ok(Imported { run, figures })
}

/// Numbers must be each record's own, and prompts of finished requests have tokens.
fn check(path: &Path, records: &[Record]) -> Result<(), InputError> {
    let mut places: HashMap<u64, Location> = HashMap::with_capacity(records.len());
    for record in records {
        if record.num_prefill_tokens == 0 && record.status == RequestStatus::Ok {
            let found = "a prompt of 0 tokens";
            return Err(InputError::invalid(
                path,
                record.place.clone(),
                "a prompt of at least 1 token",
                found,
            ));
        }
        let Some(id) = record.request_id else { continue };
        if let Some(first) = places.insert(id, record.place.clone()) {
            let found = format!("request {id} again (first{first})");
            return Err(InputError::invalid(path, record.place.clone(), "a request id of its own", found));
        }
    }
    Ok(())
}

/// Whether every finished request has a gap for each token but the first; says so where it has not.
fn find_token_times(records: &[Record], notes: &mut Vec<String>) -> bool {
    let finished = records.iter().filter(|record| record.status == RequestStatus::Ok);
    let (mut num_finished, mut num_other, mut num_gaps, mut num_tokens) = (0_u64, 0_u64, 0_u64, 0_u64);
    let (mut num_equal, mut num_pairs) = (0_u64, 0_u64);
    for record in finished {
        let Some(gaps) = &record.gaps else { return false };
        let (gaps_of, tokens_of) = (gaps.len() as u64, u64::from(record.num_decode_tokens_actual));
        num_finished += 1;
        num_gaps += gaps_of;
        num_tokens += tokens_of;
        num_other += u64::from(gaps_of + 1 != tokens_of);
        num_pairs += gaps_of.saturating_sub(1);
        num_equal += gaps.windows(2).filter(|pair| pair[0] == pair[1]).count() as u64;
    }
    if num_other > 0 {
        notes.push(format!(
            "no token times: {num_other} of {num_finished} requests came in another number of pieces than tokens \
             ({} pieces, {num_tokens} tokens)",
            num_gaps + num_finished
        ));
        return false;
    }
    // A piece of several tokens whose gap the tool split evenly among them.
    if num_equal as f64 > MAX_SHARE_OF_EQUAL_GAPS * num_pairs as f64 {
        notes.push(format!(
            "no token times: {num_equal} of {num_pairs} gaps are the same as the gap before, to the nanosecond; the tool \
             spread pieces of several tokens evenly"
        ));
        return false;
    }
    num_finished > 0
}

/// Times as the file has them, from its earliest arrival; all at 0 where it has none.
fn own_times(path: &Path, parsed: &Parsed, has_schedule: bool) -> Result<Times, InputError> {
    let records = &parsed.records;
    let Some(basis) = parsed.arrivals.or(has_schedule.then_some(ArrivalBasis::AtOnce)) else {
        let expected = "arrivals, which this result does not hold; --workload FILE gives them";
        return Err(InputError::invalid(path, Location::File, expected, "none"));
    };
    if basis == ArrivalBasis::AtOnce {
        let zeros = vec![Nanos::ZERO; records.len()];
        return Ok(Times { arrivals: zeros.clone(), sent: zeros, basis });
    }
    let mut arrivals = Vec::with_capacity(records.len());
    let mut sent = Vec::with_capacity(records.len());
    for record in records {
        let Some(at) = record.sent.or(record.scheduled) else {
            let expected = "a time at which the request was sent";
            return Err(InputError::invalid(path, record.place.clone(), expected, "none"));
        };
        sent.push(at);
        // A clock's step or a request sent early must not make a first token come before its arrival.
        let due = record.scheduled.filter(|_| basis == ArrivalBasis::Scheduled);
        arrivals.push(due.map_or(at, |due| due.min(at)));
    }
    let start = arrivals.iter().copied().min().unwrap_or_default();
    for time in arrivals.iter_mut().chain(&mut sent) {
        *time = time.saturating_since(start);
    }
    Ok(Times { arrivals, sent, basis })
}

/// Arrivals of a schedule apart; the client's clock is laid so that no request was sent before it was due.
fn schedule_times(
    path: &Path,
    records: &mut [Record],
    own: &Times,
    recorded: Option<ArrivalBasis>,
    notes: &mut Vec<String>,
) -> Result<Times, InputError> {
    let scheduled = schedule::read(path, records)?;
    let arrivals: Vec<Nanos> = scheduled.iter().map(|request| request.arrival).collect();
    for (record, request) in records.iter_mut().zip(&scheduled) {
        record.request_id = Some(request.request_id);
        record.num_decode_tokens = request.num_decode_tokens;
        if let (0, Some(stated)) = (record.num_prefill_tokens, request.num_prefill_tokens) {
            record.num_prefill_tokens = stated;
        }
    }
    let basis = ArrivalBasis::Scheduled;
    if recorded.is_none_or(|basis| basis == ArrivalBasis::AtOnce) {
        notes
            .push("the result does not say when requests were sent: taken as sent when they were due".into());
        return Ok(Times { sent: arrivals.clone(), arrivals, basis });
    }
    let lag = |sent: Nanos, due: Nanos| i128::from(sent.0) - i128::from(due.0);
    let lags = || own.sent.iter().zip(&arrivals).map(|(&sent, &due)| lag(sent, due));
    let least = lags().min().unwrap_or_default();
    let most = lags().max().unwrap_or_default() - least;
    notes.push(format!(
        "times count from the schedule, by which the first request to keep it was sent on time and the latest {} after it",
        Nanos(most as u64)
    ));
    let sent = lags().zip(&arrivals).map(|(lag, &due)| due + Nanos((lag - least) as u64)).collect();
    Ok(Times { arrivals, sent, basis })
}

fn info(
    path: &Path,
    format: ResultFormat,
    parsed: &Parsed,
    options: &ImportOptions,
    arrivals: ArrivalBasis,
) -> RunInfo {
    let is_simulated = options.simulated || format == ResultFormat::Vidur;
    let backend = options.backend.clone().or_else(|| parsed.backend.clone());
    RunInfo {
        gpu: options.gpu.clone(),
        deployment: options.deployment.clone(),
        source: Some(RunSource {
            tool: format.name().into(),
            version: parsed.version.clone(),
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            model: options.model.clone().or_else(|| parsed.model.clone()),
            arrivals,
            published: parsed.published.iter().cloned().collect(),
            notes: Vec::new(),
        }),
        ..RunInfo::new(
            if is_simulated { RunKind::Simulated } else { RunKind::Real },
            backend.unwrap_or_else(|| format.name().into()),
        )
    }
}

fn build(info: RunInfo, records: &[Record], times: &Times, has_token_times: bool) -> Run {
    let mut requests = Vec::with_capacity(records.len());
    let mut tokens = Vec::new();
    for (i, record) in records.iter().enumerate() {
        let request_id = record.request_id.unwrap_or(i as u64);
        let first = record.first_token.map(|span| times.sent[i] + span);
        requests.push(RequestMetrics {
            request_id,
            arrival_time_ns: times.arrivals[i],
            admitted_time_ns: None,
            first_token_time_ns: first,
            ttft_ns: first.map(|first| first.saturating_since(times.arrivals[i])),
            completion_time_ns: record.last_token.map(|span| times.sent[i] + span),
            num_prefill_tokens: record.num_prefill_tokens,
            num_decode_tokens: asked_for(record),
            num_decode_tokens_actual: record.num_decode_tokens_actual,
            status: record.status,
            backend: info.engine.clone(),
        });
        if let (true, RequestStatus::Ok, Some(first)) = (has_token_times, record.status, first) {
            push_tokens(&mut tokens, request_id, first, record.gaps.as_deref().unwrap_or_default());
        }
    }
    requests.sort_by_key(|request| request.request_id);
    tokens.sort_by_key(|token| (token.request_id, token.token_index));
    Run { info, requests, tokens, steps: Vec::new() }
}

/// The output length asked for: of a finished request at least what it produced, of others 0 where nobody says.
fn asked_for(record: &Record) -> u32 {
    let produced = if record.status == RequestStatus::Ok { record.num_decode_tokens_actual } else { 0 };
    record.num_decode_tokens.unwrap_or(produced)
}

fn push_tokens(tokens: &mut Vec<TokenMetrics>, request_id: u64, first: Nanos, gaps: &[Nanos]) {
    let mut time = first;
    tokens.push(TokenMetrics {
        request_id,
        token_index: 0,
        token_time_ns: time,
        token_latency_ns: Nanos::ZERO,
    });
    for (i, &gap) in gaps.iter().enumerate() {
        time += gap;
        let token_index = i as u32 + 1;
        tokens.push(TokenMetrics { request_id, token_index, token_time_ns: time, token_latency_ns: gap });
    }
}

fn note_unfinished(records: &[Record], notes: &mut Vec<String>) {
    let unfinished: Vec<_> = records.iter().filter(|record| record.status != RequestStatus::Ok).collect();
    if unfinished.is_empty() {
        return;
    }
    let is_unknown = |record: &&&Record| record.num_prefill_tokens == 0 || asked_for(record) == 0;
    let unknown = match unfinished.iter().filter(is_unknown).count() {
        0 => String::new(),
        n => {
            format!("; of {n} the result does not hold both lengths (0 where it does not; --workload tells)")
        }
    };
    notes.push(format!("{} of {} requests did not finish{unknown}", unfinished.len(), records.len()));
}

fn note_model(parsed: &Parsed, options: &ImportOptions, notes: &mut Vec<String>) {
    let model = options.model.as_ref().or(parsed.model.as_ref());
    if let (Some(model), Some(deployment)) = (model, &options.deployment)
        && *model != deployment.model
    {
        notes.push(format!("the result is of model {model:?}, the deployment of {:?}", deployment.model));
    }
}

/// Of the workload, where every request of it is known.
fn workload_digest(run: &Run) -> Option<String> {
    let workload = run.workload();
    let is_known = workload.requests.len() == run.requests.len();
    is_known.then(|| sha256_hex(workload.canonical_text().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: u64, line: u64) -> Record {
        Record {
            place: Location::Line(line),
            request_id: Some(id),
            scheduled: None,
            sent: Some(Nanos(line)),
            first_token: Some(Nanos(5)),
            last_token: Some(Nanos(9)),
            gaps: None,
            num_prefill_tokens: 3,
            num_decode_tokens: None,
            num_decode_tokens_actual: 2,
            status: RequestStatus::Ok,
        }
    }

    #[test]
    fn a_repeated_number_and_an_empty_prompt_are_named() {
        let path = Path::new("r.csv");
        let error = check(path, &[record(7, 2), record(8, 3), record(7, 4)]).unwrap_err().to_string();
        assert_eq!(
            error,
            "r.csv, line 4: expected a request id of its own, found request 7 again (first, line 2)"
        );
        let empty = Record { num_prefill_tokens: 0, ..record(1, 2) };
        let error = check(path, std::slice::from_ref(&empty)).unwrap_err().to_string();
        assert_eq!(error, "r.csv, line 2: expected a prompt of at least 1 token, found a prompt of 0 tokens");
        // Of a failed request it may be unknown.
        assert!(check(path, &[Record { status: RequestStatus::Incomplete, ..empty }]).is_ok());
    }

    #[test]
    fn the_clocks_are_laid_so_that_nothing_is_sent_before_it_is_due() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.csv");
        std::fs::write(&path, "request_id,arrival_time_ns\n7,100\n8,200\n").unwrap();
        let own =
            Times { arrivals: vec![], sent: vec![Nanos(9_000), Nanos(9_070)], basis: ArrivalBasis::Sent };
        let mut records = [record(7, 2), record(8, 3)];
        let times =
            schedule_times(&path, &mut records, &own, Some(ArrivalBasis::Sent), &mut Vec::new()).unwrap();
        assert_eq!(times.arrivals, [Nanos(100), Nanos(200)]);
        // The second kept the schedule best; the first was sent 30 ns late beside it.
        assert_eq!(times.sent, [Nanos(130), Nanos(200)]);
    }
}
