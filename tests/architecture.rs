//! The shape of the source: arrows between files point down and form no circle, a name names one type, functions fit on
//! a screen, and a file that is mentioned exists.
//!
//! The files are read as text that rustfmt has formatted, without comments and tests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// What imports what: a file may import from its own room and from the floors below, not from a room beside it.
const FLOORS: [&[&str]; 12] = [
    &["lib"],
    &["unfused"],
    &["losses"],
    &["linear"],
    &["softmax", "elementwise", "nll"],
    &["composed"],
    &["rows"],
    &["reduction"],
    &["cast"],
    &["cpu", "cuda"],
    &["custom_op"],
    &["check", "device"],
];
const LONGEST_FUNCTION: usize = 80;
const LONGEST_LINE: usize = 120;

struct Source {
    /// `["softmax", "cpu", "engine"]`; empty for lib.rs.
    module: Vec<String>,
    path: PathBuf,
    /// Lines without comments and test modules.
    lines: Vec<String>,
}

fn files(folder: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files(&path, extensions, found)?;
        } else if path.extension().is_some_and(|found| extensions.iter().any(|extension| found == *extension)) {
            found.push(path);
        }
    }
    Ok(())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files of `src/` but the tests.
fn sources() -> Vec<Source> {
    let mut paths = vec![];
    files(&root().join("src"), &["rs"], &mut paths).unwrap();
    paths.sort();
    let is_test = |path: &PathBuf| path.ends_with("tests.rs") || path.ends_with("testing.rs");
    paths.into_iter().filter(|path| !is_test(path)).map(source).collect()
}

fn source(path: PathBuf) -> Source {
    let text = fs::read_to_string(&path).unwrap();
    let mut module: Vec<String> = path
        .strip_prefix(root().join("src"))
        .unwrap()
        .with_extension("")
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    if module.last().is_some_and(|name| name == "mod" || name == "lib") {
        module.pop();
    }
    let mut lines = vec![];
    let mut skipped = None;
    let mut is_test = false;
    for line in text.lines() {
        let indentation = line.len() - line.trim_start().len();
        if let Some(end) = skipped {
            if indentation == end && line.trim() == "}" {
                skipped = None;
            }
            continue;
        }
        if is_test && line.trim_end().ends_with('{') {
            skipped = Some(indentation);
        }
        is_test = line.trim() == "#[cfg(test)]" || is_test && line.trim_start().starts_with('#');
        let code = if line.trim_start().starts_with("//") { "" } else { line.split(" // ").next().unwrap_or("") };
        if skipped.is_none() {
            lines.push(code.to_string());
        }
    }
    Source { module, path, lines }
}

/// The paths that begin with `crate::` or `super::`, braces expanded.
fn paths(lines: &[String]) -> Vec<Vec<String>> {
    let text = lines.join(" ");
    let mut found = vec![];
    for start in ["crate::", "super::"] {
        for (at, _) in text.match_indices(start) {
            let before = text[..at].chars().next_back();
            if !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                expand(&text[at..], vec![], &mut found);
            }
        }
    }
    found
}

/// Reads one path, or the paths in a brace, and returns the text behind.
fn expand<'t>(text: &'t str, mut path: Vec<String>, found: &mut Vec<Vec<String>>) -> &'t str {
    let mut rest = text;
    loop {
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        path.push(rest[..end].to_string());
        rest = &rest[end..];
        let Some(behind) = rest.strip_prefix("::") else {
            found.push(path);
            return rest;
        };
        rest = behind;
        if let Some(mut inside) = rest.strip_prefix('{') {
            loop {
                inside = expand(inside.trim_start(), path.clone(), found).trim_start();
                let Some(next) = inside.strip_prefix(',') else { return inside.strip_prefix('}').unwrap_or(inside) };
                if let Some(behind) = next.trim_start().strip_prefix('}') {
                    return behind;
                }
                inside = next;
            }
        }
    }
}

/// The files that a file imports from.
fn imports(source: &Source, modules: &BTreeSet<Vec<String>>) -> BTreeSet<Vec<String>> {
    let mut found = BTreeSet::new();
    for path in paths(&source.lines) {
        let ups = path.iter().take_while(|part| *part == "super").count();
        let mut absolute = match ups {
            0 => vec![],
            _ => source.module[..source.module.len() - ups].to_vec(),
        };
        absolute.extend(path[ups.max(1)..].iter().cloned());
        while !modules.contains(&absolute) && absolute.pop().is_some() {}
        if absolute != source.module && !absolute.is_empty() {
            found.insert(absolute);
        }
    }
    found
}

fn graph(sources: &[Source]) -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let modules: BTreeSet<_> = sources.iter().map(|source| source.module.clone()).collect();
    sources.iter().map(|source| (source.module.clone(), imports(source, &modules))).collect()
}

fn floor(module: &[String]) -> usize {
    let room = module.first().map_or("lib", String::as_str);
    let floor = FLOORS.iter().position(|rooms| rooms.contains(&room));
    floor.unwrap_or_else(|| panic!("src/{room} is on no floor: add it to FLOORS"))
}

#[test]
fn arrows_point_down() {
    let mut wrong = vec![];
    for (from, imports) in graph(&sources()) {
        for to in imports {
            if to[..1] != from[..from.len().min(1)] && floor(&to) <= floor(&from) {
                wrong.push(format!("{} imports {}", from.join("::"), to.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn files_form_no_circle() {
    let mut graph = graph(&sources());
    // takes away what imports nothing that is left
    loop {
        let free: Vec<_> = graph.iter().filter(|(_, to)| to.is_empty()).map(|(from, _)| from.clone()).collect();
        if free.is_empty() {
            break;
        }
        graph.retain(|from, _| !free.contains(from));
        graph.values_mut().for_each(|to| to.retain(|to| !free.contains(to)));
    }
    assert!(graph.is_empty(), "in or above a circle: {graph:#?}");
}

#[test]
fn a_name_is_one_type() {
    let mut names: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources() {
        for line in &source.lines {
            let mut words = line.split_whitespace().filter(|word| !word.starts_with("pub") && *word != "unsafe");
            let kind = words.next().unwrap_or("");
            let is_type = matches!(kind, "struct" | "enum" | "trait" | "union")
                || kind == "type" && !line.starts_with(' ') && !line.contains(" for ");
            if is_type && let Some(name) = words.next() {
                let name: String = name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                names.entry(name).or_default().push(source.path.display().to_string());
            }
        }
    }
    names.retain(|_, files| files.len() > 1);
    assert!(names.is_empty(), "{names:#?}");
}

#[test]
fn functions_fit_on_a_screen() {
    let mut long = vec![];
    for source in sources() {
        let text = fs::read_to_string(&source.path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        for (start, line) in lines.iter().enumerate() {
            let code = line.trim_start();
            let indentation = line.len() - code.len();
            let mut words = code.split_whitespace();
            if !words.by_ref().take_while(|word| !word.contains('(')).any(|word| word == "fn")
                && !code.starts_with("fn ")
            {
                continue;
            }
            let end = format!("{}}}", " ".repeat(indentation));
            let Some(length) = lines[start..].iter().position(|line| *line == end) else { continue };
            let without_body = lines[start..start + length].iter().any(|line| line.trim_end().ends_with(';'))
                && !lines[start..start + length].iter().any(|line| line.trim_end().ends_with('{'));
            if length + 1 > LONGEST_FUNCTION && !without_body {
                long.push(format!("{}:{}: {} lines", source.path.display(), start + 1, length + 1));
            }
        }
    }
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn lifetimes_are_borrowed() {
    for source in sources() {
        let phantom = source.lines.iter().any(|line| line.contains("PhantomData"));
        assert!(!phantom, "{}: hold the reference, or a slice of cells", source.path.display());
    }
}

#[test]
fn lines_fit() {
    let mut paths = vec![];
    for folder in ["src", "kernels", "tests", "benches", "examples", "softgpu/src"] {
        files(&root().join(folder), &["rs", "cuh", "cu", "cpp", "h"], &mut paths).unwrap();
    }
    let mut long = vec![];
    for path in paths {
        for (i, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            // an address can't be broken
            if line.chars().count() > LONGEST_LINE && !line.contains("](https://") {
                long.push(format!("{}:{}: {} columns", path.display(), i + 1, line.chars().count()));
            }
        }
    }
    assert!(long.is_empty(), "{} lines: {long:#?}", long.len());
}

#[test]
fn mentioned_files_exist() {
    let mut mentioning = vec![root().join("README.md"), root().join("CONTRIBUTING.md"), root().join("build.rs")];
    for folder in ["src", "kernels", "tests", "benches", "examples", "scripts"] {
        files(&root().join(folder), &["rs", "cuh", "cu", "md", "py"], &mut mentioning).unwrap();
    }
    let is_of_path = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    let mut missing = vec![];
    for path in mentioning {
        let text = fs::read_to_string(&path).unwrap();
        for folder in ["src/", "kernels/", "tests/", "benches/", "scripts/"] {
            for (at, _) in text.match_indices(folder) {
                // not the end of a longer path, and no pattern: `src/losses/<name>.rs`, `kernels/modules/FILE.cu`
                let name = text[at..].split(|c| !is_of_path(c)).next().unwrap_or("").trim_end_matches('.');
                let is_pattern = text[at + name.len()..].starts_with(['<', '*', '{', '$']) || name.contains("FILE");
                if text[..at].ends_with(is_of_path) || is_pattern || root().join(name).exists() {
                    continue;
                }
                missing.push(format!("{} mentions {name}", path.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}
