//! Pictures, made of a CSV file's rows and nothing else.

use crate::table::{FRESH, Row};
use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const WIDTH: u32 = 780;
const HEIGHT: u32 = 420;
/// Of the width, beside the chart.
const LEGEND: u32 = 200;
const COLOURS: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(255, 127, 14),
    RGBColor(23, 190, 207),
    RGBColor(140, 86, 75),
    RGBColor(127, 127, 127),
];

struct Panel {
    title: String,
    gradient: bool,
    y: &'static str,
    logarithmic: bool,
    /// By label: the classes, and the value at them.
    lines: BTreeMap<String, Vec<(f64, f64)>>,
}

/// What a picture shows of a row with so many logits.
type Value = fn(&Row, f64) -> Option<f64>;

/// One picture for each kind of value, a panel for each dtype and kind of pass of cross-entropy.
pub fn draw_all(csv: &Path, rows: &[Row], mut done: impl FnMut()) -> Result<Vec<PathBuf>> {
    let kinds: [(&str, &str, bool, Value); 3] = [
        ("time", "ns a logit", true, |r, logits| Some(r.p50_us * 1e3 / logits)),
        ("bandwidth", "minimum bytes / time, share of copy bandwidth", false, |r, _| r.share_of_copy),
        ("memory", "peak allocation, bytes a logit", false, |r, logits| Some(r.peak_bytes? / logits)),
    ];
    let mut written = vec![];
    for (name, y, logarithmic, value) in kinds {
        let panels = panels(rows, y, logarithmic, value);
        if !panels.is_empty() {
            let path = csv.with_extension(format!("{name}.svg"));
            draw(&path, &panels)?;
            written.push(path);
        }
        done();
    }
    Ok(written)
}

fn panels(rows: &[Row], y: &'static str, logarithmic: bool, value: Value) -> Vec<Panel> {
    let others = ["accumulate", "host_call", "first_call"];
    let shown = |row: &&Row| row.loss == "cross_entropy" && !others.contains(&row.pass.as_str());
    let matrices = || rows.iter().filter(shown).filter_map(|row| Some((row, row.matrix()?)));
    let is_large = |(n, v): (usize, usize)| n * v >= 1 << 20;
    let any_large = matrices().any(|(_, matrix)| is_large(matrix));
    let mut panels: BTreeMap<(bool, String), Panel> = BTreeMap::new();
    for (row, (n, classes)) in matrices() {
        let Some(v) = value(row, (n * classes) as f64).filter(|v| v.is_finite() && *v > 0.0) else { continue };
        let gradient = row.pass != "forward";
        let what = if gradient { "with gradient" } else { "forward" };
        let memory = if row.memory == FRESH { ", fresh memory" } else { "" };
        let panel = panels.entry((gradient, row.dtype.clone())).or_insert_with(|| Panel {
            title: format!("cross-entropy {}, {what}{memory}: {}, {}", row.dtype, row.device, row.date),
            gradient,
            y,
            logarithmic,
            lines: BTreeMap::new(),
        });
        // only what fills the machine lies on a line; small problems measure the overhead
        if !any_large || is_large((n, classes)) {
            let label =
                if gradient { format!("{} {}", row.implementation, row.pass) } else { row.implementation.clone() };
            panel.lines.entry(label).or_default().push((classes as f64, v));
        }
    }
    // a line has two ends
    let is_line = |line: &Vec<(f64, f64)>| line.iter().any(|point| point.0 != line[0].0);
    let mut panels: Vec<Panel> = panels.into_values().filter(|panel| panel.lines.values().any(is_line)).collect();
    for line in panels.iter_mut().flat_map(|panel| panel.lines.values_mut()) {
        line.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    panels
}

fn draw(path: &Path, panels: &[Panel]) -> Result<()> {
    let columns = panels.len().clamp(1, 2);
    let lines = panels.len().div_ceil(columns);
    let root = SVGBackend::new(path, (WIDTH * columns as u32, HEIGHT * lines as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (panel, area) in panels.iter().zip(root.split_evenly((lines, columns))) {
        // a line has its colour in every panel
        let alike = panels.iter().filter(|other| other.gradient == panel.gradient);
        let labels: BTreeSet<&String> = alike.flat_map(|panel| panel.lines.keys()).collect();
        let colours: BTreeMap<&String, &RGBColor> = labels.into_iter().zip(COLOURS.iter().cycle()).collect();
        let (area, legend) = area.split_horizontally(WIDTH - LEGEND);
        draw_legend(&legend, panel, &colours)?;
        let points = || panel.lines.values().flatten();
        let range = |of: fn(&(f64, f64)) -> f64| {
            points().map(of).fold((f64::INFINITY, 0f64), |(low, high), v| (low.min(v), high.max(v)))
        };
        let ((x0, x1), (y0, y1)) = (range(|p| p.0), range(|p| p.1));
        let x = (x0 / 1.3..x1 * 1.3).log_scale();
        let mut chart = ChartBuilder::on(&area);
        chart.caption(&panel.title, ("sans-serif", 14)).margin(8).x_label_area_size(36).y_label_area_size(56);
        if panel.logarithmic {
            finish(chart.build_cartesian_2d(x, (y0 / 1.5..y1 * 1.5).log_scale())?, panel, &colours)?;
        } else {
            finish(chart.build_cartesian_2d(x, 0.0..y1 * 1.1)?, panel, &colours)?;
        }
    }
    root.present()?;
    Ok(())
}

fn draw_legend(
    area: &DrawingArea<SVGBackend, Shift>,
    panel: &Panel,
    colours: &BTreeMap<&String, &RGBColor>,
) -> Result<()> {
    for (i, label) in panel.lines.keys().enumerate() {
        let y = 40 + 20 * i as i32;
        area.draw(&PathElement::new([(4, y), (24, y)], colours[label].stroke_width(2)))?;
        area.draw(&Text::new(label.as_str(), (30, y - 6), ("sans-serif", 12)))?;
    }
    Ok(())
}

fn finish<'a, Y>(
    mut chart: ChartContext<'a, SVGBackend<'a>, Cartesian2d<LogCoord<f64>, Y>>,
    panel: &Panel,
    colours: &BTreeMap<&String, &RGBColor>,
) -> Result<()>
where
    Y: Ranged<ValueType = f64> + plotters::coord::ranged1d::ValueFormatter<f64>,
{
    let y_label = |v: &f64| if *v >= 0.01 { format!("{v:.2}") } else { format!("{v:.0e}") };
    let mut mesh = chart.configure_mesh();
    mesh.x_desc("classes V")
        .y_desc(panel.y)
        .x_label_formatter(&|v| format!("{v:.0}"))
        .y_label_formatter(&y_label)
        .draw()?;
    for (label, line) in &panel.lines {
        chart.draw_series(LineSeries::new(line.iter().copied(), colours[label].stroke_width(2)).point_size(3))?;
    }
    Ok(())
}
