//! Which tables lie below a folder, of which GPU and model.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use plumbline_schema::{GpuSpec, InputError};

use super::{Dialect, ImportError, ImportOptions, tables::EXTENSIONS};

/// What a table holds, as its file name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Mlp,
    Attention,
    AllReduce,
    SendRecv,
}

impl Kind {
    /// The kind of a file of this name, without its extension.
    fn of(stem: &str, dialect: Dialect) -> Option<Self> {
        match stem {
            "mlp" => Some(Self::Mlp),
            "linear_op" if dialect == Dialect::Frontier => Some(Self::Mlp),
            "attention" => Some(Self::Attention),
            "all_reduce" => Some(Self::AllReduce),
            "send_recv" => Some(Self::SendRecv),
            _ => None,
        }
    }

    fn is_network(self) -> bool {
        matches!(self, Self::AllReduce | Self::SendRecv)
    }
}

/// A table by its place.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub path: PathBuf,
    pub kind: Kind,
    /// What the path calls the GPU (`a100`) or the node (`a100_dgx`).
    label: Option<String>,
    /// The folders between that and the file, joined by `/`.
    pub model: Option<String>,
}

/// The tables to read.
#[derive(Debug)]
pub(super) struct Selection {
    pub gpu: GpuSpec,
    /// In the order of their paths.
    pub tables: Vec<Found>,
    pub notes: Vec<String>,
    /// CSV files that are none of the tables.
    pub ignored: Vec<PathBuf>,
}

/// Names that tables give a GPU: name, spec, and what is to be said about it.
const ALIASES: [(&str, &str, Option<&str>); 5] = [
    ("a100", "a100-sxm4-80gb", None),
    ("a800", "a100-sxm4-80gb", Some("an A800 is an A100 with a slower NVLink")),
    ("h100", "h100-sxm5-80gb", None),
    ("h800", "h100-sxm5-80gb", Some("an H800 is an H100 with a slower NVLink")),
    ("h200", "h200-sxm-141gb", None),
];

/// The name that Vidur's folders give a GPU: `a100` for `a100-sxm4-80gb`; its own name where they have none.
#[must_use]
pub fn short_gpu_name(gpu: &str) -> &str {
    ALIASES.iter().find(|(_, spec, _)| *spec == gpu).map_or(gpu, |(alias, ..)| alias)
}

/// The spec that a GPU's or node's label means (`a100`, `a100_dgx`, `h100-sxm5-80gb`), and a remark.
fn resolve(label: &str) -> Option<(GpuSpec, Option<&'static str>)> {
    let label = label.to_ascii_lowercase();
    let gpu = label.split('_').next().unwrap_or_default();
    let alias = ALIASES.iter().find(|(name, ..)| *name == gpu);
    alias
        .and_then(|(_, spec, remark)| Some((GpuSpec::by_name(spec)?, *remark)))
        .or_else(|| GpuSpec::by_name(&label).map(|spec| (spec, None)))
}

/// Finds the tables below `dir` and the GPU they are of.
pub(super) fn select(
    dir: &Path,
    dialect: Dialect,
    options: &ImportOptions,
) -> Result<Selection, ImportError> {
    // Folders above the one given may name the GPU.
    let root = dir.canonicalize().map_err(|e| InputError::io(dir, e))?;
    let mut files = Vec::new();
    list(&root, dir, &mut files)?;
    files.sort();
    let (mut tables, mut ignored) = (Vec::new(), Vec::new());
    for (file, shown) in files {
        match found(&file, &shown, dialect) {
            Some(table) => tables.push(table),
            None => ignored.push(shown),
        }
    }
    if tables.is_empty() {
        let expected = match dialect {
            Dialect::Vidur => "mlp, attention, all_reduce or send_recv",
            Dialect::Frontier => "mlp, linear_op, attention, all_reduce or send_recv",
        };
        let names: Vec<_> = ignored.iter().take(8).map(|path| path.display().to_string()).collect();
        let found = if names.is_empty() { "no CSV file".into() } else { names.join(", ") };
        let expected = format!("{expected} ({})", EXTENSIONS.join(", "));
        return Err(ImportError::NoTables { dir: dir.into(), expected, found });
    }
    let mut notes = Vec::new();
    let gpu = select_gpu(dir, &mut tables, options, &mut notes)?;
    select_node(dir, &mut tables, options, &mut notes)?;
    Ok(Selection { gpu, tables, notes, ignored })
}

/// Lists CSV files, each as found and as the caller named it. Links are not followed: they end in no loop.
fn list(folder: &Path, shown: &Path, files: &mut Vec<(PathBuf, PathBuf)>) -> Result<(), InputError> {
    let wrap = |e| InputError::io(shown, e);
    for entry in std::fs::read_dir(folder).map_err(wrap)? {
        let entry = entry.map_err(wrap)?;
        let kind = entry.file_type().map_err(wrap)?;
        let shown = shown.join(entry.file_name());
        if kind.is_dir() {
            list(&entry.path(), &shown, files)?;
        } else if kind.is_file() && stem(&entry.path()).is_some() {
            files.push((entry.path(), shown));
        }
    }
    Ok(())
}

/// The name of a CSV file without its extension; `None` for other files.
fn stem(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    EXTENSIONS.iter().find_map(|extension| name.strip_suffix(extension))
}

fn found(file: &Path, shown: &Path, dialect: Dialect) -> Option<Found> {
    let kind = Kind::of(stem(file)?, dialect)?;
    let folders: Vec<&str> = file.parent()?.components().filter_map(|c| c.as_os_str().to_str()).collect();
    // `profiling/compute/a100/ORG/MODEL`, `profiling/network/a100_dgx`, or as older versions have it `profiling/a100`.
    let is_kind = |name: &str| matches!(name, "compute" | "network");
    let after = |at: usize| folders.get(at + 1).map(|_| at + 1);
    let of_layout = folders.iter().rposition(|&name| is_kind(name)).and_then(after).or_else(|| {
        let at = folders.iter().rposition(|&name| name == "profiling").and_then(after);
        at.filter(|&at| !is_kind(folders[at]))
    });
    let at = of_layout.or_else(|| folders.iter().rposition(|&name| resolve(name).is_some()));
    let model = at.map(|at| folders[at + 1..].join("/")).filter(|model| !model.is_empty());
    let label = at.map(|at| folders[at].to_owned());
    Some(Found { path: shown.into(), kind, label, model: if kind.is_network() { None } else { model } })
}

fn known() -> String {
    GpuSpec::shipped().into_iter().map(|spec| spec.name).collect::<Vec<_>>().join(", ")
}

fn select_gpu(
    dir: &Path,
    tables: &mut Vec<Found>,
    options: &ImportOptions,
    notes: &mut Vec<String>,
) -> Result<GpuSpec, ImportError> {
    let error = |found: String| ImportError::Gpu { dir: dir.into(), known: known(), found };
    let mut labels: BTreeMap<Option<String>, usize> = BTreeMap::new();
    for table in tables.iter() {
        *labels.entry(table.label.clone()).or_default() += 1;
    }
    let spec_of = |label: &Option<String>| label.as_deref().and_then(resolve).map(|(spec, _)| spec);
    let listed = || {
        let one = |(label, num): (&Option<String>, &usize)| {
            let name = label.as_deref().unwrap_or("no GPU in the path");
            let unknown = if label.is_some() && spec_of(label).is_none() { ", unknown" } else { "" };
            format!("{name} ({num}{unknown})")
        };
        labels.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let gpu = if let Some(asked) = &options.gpu {
        let gpu = resolve(asked).map(|(spec, _)| spec).ok_or_else(|| error(format!("--gpu {asked}")))?;
        let is_meant = |label: &Option<String>| match spec_of(label) {
            Some(spec) => spec.name == gpu.name,
            // A folder of an unknown name is what the caller says, unless there are others to tell it from.
            None => labels.len() == 1 || label.is_none(),
        };
        let dropped: Vec<_> = labels.keys().filter(|label| !is_meant(label)).cloned().collect();
        if dropped.len() == labels.len() {
            return Err(error(format!("{}, and --gpu {asked}", listed())));
        }
        tables.retain(|table| is_meant(&table.label));
        if !dropped.is_empty() {
            let names: Vec<_> = dropped.into_iter().flatten().collect();
            notes.push(format!("tables of other GPUs are not read: {}", names.join(", ")));
        }
        gpu
    } else {
        let mut specs: Vec<_> = labels.keys().map(spec_of).collect();
        specs.dedup_by(|a, b| a.as_ref().map(|s| &s.name) == b.as_ref().map(|s| &s.name));
        match specs.as_slice() {
            [Some(gpu)] => gpu.clone(),
            _ => return Err(error(format!("{}; --gpu says which", listed()))),
        }
    };
    for label in tables.iter().filter_map(|table| table.label.clone()).collect::<BTreeSet<_>>() {
        let remark = resolve(&label).map(|(_, remark)| remark);
        match remark {
            Some(None) => {}
            Some(Some(remark)) => notes.push(format!("{label}: {remark}; taken for {}", gpu.name)),
            None => notes.push(format!("{label}: taken for {}, as asked", gpu.name)),
        }
    }
    // A collective's time is the link's, which is not that of the GPU the bundle is of.
    let is_other_link =
        |table: &Found| table.label.as_deref().and_then(resolve).is_some_and(|(_, remark)| remark.is_some());
    let num_before = tables.len();
    tables.retain(|table| !(table.kind.is_network() && is_other_link(table)));
    if tables.len() < num_before {
        notes.push(format!("{} network tables are left out: another NVLink", num_before - tables.len()));
    }
    Ok(gpu)
}

/// Keeps the network tables of one kind of node.
fn select_node(
    dir: &Path,
    tables: &mut Vec<Found>,
    options: &ImportOptions,
    notes: &mut Vec<String>,
) -> Result<(), ImportError> {
    let nodes: BTreeSet<Option<String>> =
        tables.iter().filter(|t| t.kind.is_network()).map(|t| t.label.clone()).collect();
    let names: Vec<_> = nodes.iter().map(|n| n.clone().unwrap_or_else(|| "unnamed".into())).collect();
    let error = |found: String| ImportError::Network { dir: dir.into(), found };
    let kept = match &options.network {
        Some(asked) if nodes.contains(&Some(asked.clone())) => Some(asked.clone()),
        Some(asked) => {
            let found = if names.is_empty() { "none".into() } else { names.join(", ") };
            return Err(error(format!("{found}, and --network {asked}")));
        }
        None if nodes.len() > 1 => return Err(error(names.join(", "))),
        None => return Ok(()),
    };
    tables.retain(|table| !table.kind.is_network() || table.label == kept);
    let dropped: Vec<_> = nodes.into_iter().filter(|node| *node != kept).flatten().collect();
    if !dropped.is_empty() {
        notes.push(format!("network tables of other nodes are not read: {}", dropped.join(", ")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labelled(path: &str, dialect: Dialect) -> Option<(Option<String>, Option<String>)> {
        found(Path::new(path), Path::new(path), dialect).map(|f| (f.label, f.model))
    }

    #[test]
    fn paths_name_gpu_and_model() {
        let some = |label: &str, model: &str| {
            Some((Some(label.to_owned()), (!model.is_empty()).then(|| model.to_owned())))
        };
        let vidur = |path| labelled(path, Dialect::Vidur);
        assert_eq!(vidur("/x/profiling/compute/a100/org/model/mlp.csv"), some("a100", "org/model"));
        assert_eq!(vidur("/x/profiling/compute/a40/org/model/mlp.csv.gz"), some("a40", "org/model"));
        assert_eq!(vidur("/x/profiling/network/a100_dgx/all_reduce.csv"), some("a100_dgx", ""));
        assert_eq!(vidur("/x/profiling/a100/attention.csv.zst"), some("a100", ""));
        assert_eq!(vidur("/x/h100/model/mlp.csv"), some("h100", "model"));
        assert_eq!(vidur("/x/y/mlp.csv"), Some((None, None)));
        assert_eq!(vidur("/x/a100/cpu_overheads.csv"), None);
        assert_eq!(vidur("/x/a100/linear_op.csv"), None);
        assert_eq!(labelled("/x/a100/m/linear_op.csv", Dialect::Frontier), some("a100", "m"));
    }

    #[test]
    fn labels_resolve_to_data_sheets() {
        let name = |label| resolve(label).map(|(spec, remark)| (spec.name, remark.is_some()));
        assert_eq!(name("A100_pairwise_nvlink"), Some(("a100-sxm4-80gb".into(), false)));
        assert_eq!(name("a800"), Some(("a100-sxm4-80gb".into(), true)));
        assert_eq!(name("h200-sxm-141gb"), Some(("h200-sxm-141gb".into(), false)));
        assert_eq!(name("a40"), None);
        assert_eq!(short_gpu_name("h100-sxm5-80gb"), "h100");
        assert_eq!(short_gpu_name("fake"), "fake");
    }
}
