//! `all_reduce.csv` and `send_recv.csv`: collectives by message and GPUs.

use plumbline_schema::{Operator, OperatorShape};

use super::{
    ImportError,
    collect::{Collector, Draft, is_countable},
    mlp::dimension_of,
    tables::Table,
};

/// Makes samples of a table of `operator`; only launches inside one node are.
pub(super) fn take(
    index: usize,
    table: &Table,
    operator: Operator,
    into: &mut Collector,
) -> Result<(), ImportError> {
    let sources: &'static [&'static str] =
        if operator == Operator::SendRecv { &["send_recv"] } else { &["all_reduce"] };
    if !table.times(sources[0]) {
        into.leave_out(sources[0], table.num_rows(), "no such column in its table");
        return Ok(());
    }
    let mut drafts = Vec::new();
    for row in table.rows() {
        let num_ranks = dimension_of(&row, "num_workers", row.whole("num_workers", 2)?)?;
        if u64::from(num_ranks) > row.whole("devices_per_node", 1)? {
            let what = format!("{} rows over several nodes", sources[0]);
            into.leave_out(what, 1, "the samples are of one node's links");
            continue;
        }
        let shape = OperatorShape::Collective { message_bytes: row.whole("size", 1)?, num_ranks };
        if !is_countable(&shape) {
            let found = format!("{:?}", shape.values());
            return Err(row.invalid("size", "a message that a GPU can hold", found).into());
        }
        drafts.push((row, Draft::new(operator, shape, sources)));
    }
    into.take_table(index, table, drafts)
}
