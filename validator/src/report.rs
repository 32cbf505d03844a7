//! What a validation found, for people: a table, and a folder of files.

mod figures;
mod folder;
mod format;
mod frontier;
mod html;
mod markdown;
mod requests;
mod table;
mod variants;

pub use figures::{Waterfall, waterfall_svg};
pub(crate) use folder::MARKER as RESULTS;
pub use folder::{ReportError, write_report};
pub use frontier::frontier_svg;
pub(crate) use markdown::cell as markdown_cell;
pub use table::{TABLE_WIDTH, render_table};
