//! Compares these structures with the C headers: the compiler checks every size and offset.

use std::fmt::Write as _;
use std::mem::offset_of;

use super::*;

macro_rules! compare {
    ($out:ident, $c:literal, $t:ty, $($field:ident = $name:literal),*) => {
        writeln!($out, "_Static_assert(sizeof(struct {}) == {}, \"size of {}\");", $c, size_of::<$t>(), $c).unwrap();
        $( writeln!(
            $out,
            "_Static_assert(offsetof(struct {}, {}) == {}, \"{}.{}\");",
            $c, $name, offset_of!($t, $field), $c, $name
        ).unwrap(); )*
    };
}

fn assertions() -> String {
    let mut o =
        String::from("#include <stddef.h>\n#include \"kmorph_handover.h\"\n#include \"kmorph_shared.h\"\n");
    compare!(
        o,
        "kmorph_info",
        Info,
        role = "role",
        tsc_khz = "tsc_khz",
        memory_block_size = "memory_block_size",
        boot_apicid = "boot_apicid",
        events_lost = "events_lost",
        low_size = "low_size",
        release = "release"
    );
    compare!(
        o,
        "kmorph_pool",
        Pool,
        base = "base",
        size = "size",
        source = "source",
        bad_address = "bad_address"
    );
    compare!(o, "kmorph_pool_list", PoolList, count = "count", range = "range");
    compare!(o, "kmorph_cpu", Cpu, apicid = "apicid", cpu = "cpu", state = "state", instance = "instance");
    compare!(o, "kmorph_cpu_list", CpuList, count = "count", cpu = "cpu");
    compare!(
        o,
        "kmorph_instance",
        Instance,
        id = "id",
        state = "state",
        incarnation = "incarnation",
        base = "base",
        control = "control",
        pulse_us = "pulse_us",
        cpu_count = "cpu_count",
        apicid = "apicid",
        trampoline = "trampoline",
        low_base = "low_base",
        low_size = "low_size",
        started_ns = "started_ns",
        stopped_cpus = "stopped_cpus",
        extent_count = "extent_count",
        extent = "extent"
    );
    compare!(
        o,
        "kmorph_memory",
        Memory,
        instance = "instance",
        base = "base",
        size = "size",
        memory_block = "memory_block"
    );
    compare!(
        o,
        "kmorph_ctl_grants",
        ctl::Grants,
        generation = "generation",
        cpu_count = "cpu_count",
        extent_count = "extent_count",
        apicid = "apicid",
        extent = "extent"
    );
    compare!(o, "kmorph_instance_list", InstanceList, count = "count", id = "id");
    compare!(
        o,
        "kmorph_start",
        Start,
        id = "id",
        stage = "stage",
        entry = "entry",
        boot_params = "boot_params",
        started_ns = "started_ns",
        started_tsc = "started_tsc"
    );
    compare!(o, "kmorph_stop", Stop, id = "id", stopped_cpus = "stopped_cpus", duration_ns = "duration_ns");
    compare!(o, "kmorph_ref", Ref, id = "id", cpu = "cpu");
    compare!(
        o,
        "kmorph_link_req",
        LinkReq,
        id_a = "id_a",
        id_b = "id_b",
        base = "base",
        size = "size",
        epoch = "epoch"
    );
    compare!(
        o,
        "kmorph_handover",
        Handover,
        key = "key",
        size = "size",
        base = "base",
        writer = "writer",
        share_count = "share_count",
        share = "share"
    );
    compare!(o, "kmorph_handover_list", HandoverList, count = "count", region = "region");
    compare!(
        o,
        "kmorph_handover_share",
        HandoverShare,
        key = "key",
        incarnation = "incarnation",
        instance = "instance",
        timeout_us = "timeout_us"
    );
    compare!(
        o,
        "kmorph_handover_assign",
        HandoverAssign,
        key = "key",
        instance = "instance",
        timeout_us = "timeout_us",
        revoke_ns = "revoke_ns"
    );
    compare!(
        o,
        "kmorph_ctl_handover",
        ctl::Handover,
        key = "key",
        base = "base",
        size = "size",
        writer = "writer"
    );
    compare!(
        o,
        "kmorph_event",
        Event,
        kind = "type",
        instance = "instance",
        incarnation = "incarnation",
        tsc = "tsc",
        seen_ns = "seen_ns",
        data = "data",
        text = "text"
    );
    compare!(
        o,
        "kmorph_ctl_primary",
        ctl::Primary,
        magic = "magic",
        size = "size",
        incarnation = "incarnation",
        door = "door",
        gone = "gone"
    );
    compare!(
        o,
        "kmorph_ctl_instance",
        ctl::Instance,
        state = "state",
        boot_nonce = "boot_nonce",
        door = "door",
        end_tsc = "end_tsc",
        notices = "notices",
        links_seen = "links_seen",
        handovers_seen = "handovers_seen",
        release = "release",
        text = "text",
        grants_seen = "grants_seen",
        grants_error = "grants_error",
        grants_what = "grants_what",
        memory_block = "memory_block",
        memory_added = "memory_added"
    );
    compare!(
        o,
        "kmorph_ctl_pulse",
        ctl::Pulse,
        count = "count",
        tsc = "tsc",
        online = "online",
        apicid = "apicid"
    );
    compare!(
        o,
        "kmorph_ctl_link",
        ctl::Link,
        base = "base",
        size = "size",
        peer_id = "peer_id",
        state = "state"
    );
    let numbers: &[(&str, u64)] = &[
        ("KMORPH_ABI_VERSION", ABI_VERSION.into()),
        ("KMORPH_MAX_CPUS", MAX_CPUS as u64),
        ("KMORPH_MAX_POOL", MAX_POOL as u64),
        ("KMORPH_MAX_HANDOVERS", MAX_HANDOVERS as u64),
        ("KMORPH_HANDOVER_ALIGN", HANDOVER_ALIGN),
        ("KMORPH_HANDOVER_MAX_US", HANDOVER_MAX_US.into()),
        ("KMORPH_HANDOVER_HIDDEN", crate::WINDOW),
        ("KMORPH_CTL_MAGIC", ctl::MAGIC),
        ("KMORPH_CTL_VERSION", ctl::VERSION.into()),
        ("KMORPH_CTL_SIZE", ctl::SIZE),
        ("KMORPH_CTL_OFF_PRIMARY", ctl::OFF_PRIMARY as u64),
        ("KMORPH_CTL_OFF_INSTANCE", ctl::OFF_INSTANCE as u64),
        ("KMORPH_CTL_OFF_PULSE", ctl::OFF_PULSE as u64),
        ("KMORPH_CTL_OFF_LINKS + offsetof(struct kmorph_ctl_links, link)", ctl::OFF_LINK as u64),
        ("KMORPH_MAX_EXTENTS", MAX_EXTENTS as u64),
        ("KMORPH_CTL_EXTENTS", ctl::EXTENTS as u64),
        ("KMORPH_CTL_OFF_GRANTS", ctl::OFF_GRANTS as u64),
        ("KMORPH_CTL_LINKS", ctl::LINKS as u64),
        (
            "KMORPH_CTL_OFF_HANDOVERS + offsetof(struct kmorph_ctl_handovers, region)",
            ctl::OFF_HANDOVER as u64,
        ),
        ("KMORPH_CTL_HANDOVERS", ctl::HANDOVERS as u64),
        ("KMORPH_LINK_LIVE", ctl::LINK_LIVE.into()),
        ("KMORPH_CTL_READY", ctl::READY.into()),
        ("KMORPH_CTL_PANIC", ctl::PANIC.into()),
        ("KMORPH_CTL_PARKED", ctl::PARKED.into()),
        ("KMORPH_CTL_LEFT", ctl::LEFT.into()),
        ("KMORPH_CPU_LENT", cpu_state::LENT.into()),
        ("KMORPH_INST_CREATED", instance_state::CREATED.into()),
        ("KMORPH_INST_STOPPED", instance_state::STOPPED.into()),
        ("KMORPH_INST_STUCK", instance_state::STUCK.into()),
        ("KMORPH_EV_READY", event_type::READY.into()),
        ("KMORPH_EV_PANIC", event_type::PANIC.into()),
        ("KMORPH_EV_LINK_UP", event_type::LINK_UP.into()),
        ("KMORPH_EV_LEFT", event_type::LEFT.into()),
    ];
    for (name, value) in numbers {
        writeln!(o, "_Static_assert({name} == {value}ULL, \"{name}\");").unwrap();
    }
    o
}

fn compile(source: &str) -> std::process::Output {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("abi.c");
    std::fs::write(&file, source).unwrap();
    let include = concat!(env!("CARGO_MANIFEST_DIR"), "/../kmod/include");
    std::process::Command::new("gcc").args(["-fsyntax-only", "-I", include]).arg(&file).output().unwrap()
}

#[test]
fn structures_match_the_headers() {
    let out = compile(&assertions());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn a_difference_would_be_found() {
    let wrong = assertions()
        .replace("offsetof(struct kmorph_start, entry) == 16", "offsetof(struct kmorph_start, entry) == 24");
    assert!(!compile(&wrong).status.success());
}
