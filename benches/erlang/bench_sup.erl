%% SPDX-License-Identifier: Apache-2.0
%% The tree: the instances, each started anew when it fails, then the one that starts and reports.
-module(bench_sup).
-behaviour(supervisor).

-export([start_link/1, add/1, instances/0]).
-export([init/1]).

start_link(tree) -> supervisor:start_link(?MODULE, tree);
start_link(instances) -> supervisor:start_link({local, bench_instances}, ?MODULE, instances).

%% Only the number is passed on: a supervisor keeps the arguments of every child.
add(Id) -> supervisor:start_child(bench_instances, [Id]).

instances() -> proplists:get_value(active, supervisor:count_children(bench_instances)).

init(tree) ->
    {ok, {#{strategy => rest_for_one, intensity => 3, period => 60},
          [#{id => instances, start => {?MODULE, start_link, [instances]}, type => supervisor},
           #{id => report, start => {bench_report, start_link, []}}]}};
init(instances) ->
    {ok, {#{strategy => simple_one_for_one, intensity => 100, period => 5},
          [#{id => instance, start => {bench_instance, start_link, []}, shutdown => 1000}]}}.
